"""The tab "Distil λ"."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from ...errors import DodeError
from ...fit.quality import GOOD, QUALITIES
from . import folders
from .names import AUTO, SAMPLER
from .request import Request

if TYPE_CHECKING:
    from .job import Job

_LOOK_SECONDS = 0.5
_JS = "js" if int(gr.__version__.split(".")[0]) > 3 else "_js"
_TAKE = """() => {
    const of = (id, tag) => gradioApp().querySelector(`#txt2img_${id} ${tag}`).value;
    const line = (id) => of(id, "textarea").trim().replace(/\\s*\\n\\s*/g, " ");
    return [line("prompt"), line("neg_prompt"), Number(of("cfg_scale", "input")),
        Number(of("width", "input")), Number(of("height", "input")), of("steps", "input")];
}"""
"""There a prompt may have several lines; here each line is a prompt."""

_NEXT = (
    f"Now choose the sampling method {SAMPLER} in txt2img: {AUTO} finds this table. "
    "To choose it by name, reload the list with the button beside it."
)

_job: Job | None = None


def make() -> list[tuple[Any, str, str]]:
    """As the host asks for its tabs."""
    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.Markdown(
            "Makes a λ table for the checkpoint that is loaded: a few-step sampler that ends where a slow one ends. "
            "The slow sampler runs once, and a fast one is fitted to it. Then choose the sampling method **D-ODE**: it "
            "finds the table by itself. Write prompts like those that you use. LoRAs of the first prompt are on for all."
        )
        with gr.Row():
            with gr.Column():
                prompts = gr.Textbox(label="Prompts, one a line", lines=3, elem_id="dode_prompts")
                negative = gr.Textbox(label="Negative prompt", lines=2, elem_id="dode_negative_prompt")
                take = gr.Button("Take what stands in txt2img", elem_id="dode_take")
                with gr.Row():
                    cfg = gr.Slider(
                        1.0, 30.0, value=7.0, step=0.5, label="CFG Scale", elem_id="dode_cfg_scale"
                    )
                    distilled_cfg = gr.Slider(
                        0.0, 30.0, value=3.5, step=0.1, label="Distilled CFG Scale (Flux)",
                        elem_id="dode_distilled_cfg_scale",
                    )  # fmt: skip
                with gr.Row():
                    width = gr.Slider(64, 2048, value=512, step=8, label="Width", elem_id="dode_width")
                    height = gr.Slider(64, 2048, value=512, step=8, label="Height", elem_id="dode_height")
                with gr.Row():
                    steps = gr.Textbox(
                        "6",
                        label="Few steps, such as 6 or 5, 6, 8 or 4-12",
                        elem_id="dode_steps",
                    )
                    quality = gr.Radio(list(QUALITIES), value=GOOD, label="Quality", elem_id="dode_quality")
                gr.Markdown("  \n".join(f"**{name}**: {each.words}" for name, each in QUALITIES.items()))
                with gr.Row():
                    name = gr.Textbox("table", label="Name of the table", elem_id="dode_name")
                    seed = gr.Number(0, label="Seed of the noises", precision=0, elem_id="dode_seed")
                for_comfyui = gr.Checkbox(
                    False, label="Save in models/lambdas, where a ComfyUI with this models folder finds it, too",
                    elem_id="dode_for_comfyui",
                )  # fmt: skip
            with gr.Column():
                with gr.Row():
                    start = gr.Button("Distil", variant="primary", elem_id="dode_start")
                    stop = gr.Button("Interrupt and keep what there is", elem_id="dode_stop")
                said = gr.Textbox(label="Cost and result", lines=6, interactive=False, elem_id="dode_said")
                report = gr.Image(show_label=False, type="pil", interactive=False, elem_id="dode_report")
        of_txt2img = [prompts, negative, cfg, width, height, steps]
        take.click(None, inputs=None, outputs=of_txt2img, **{_JS: _TAKE})
        inputs = [*of_txt2img, distilled_cfg, quality, seed, name, for_comfyui]
        start.click(_distil, inputs=inputs, outputs=[said, report])
        stop.click(_cancel, inputs=None, outputs=None)
    return [(blocks, "Distil λ", "dode_distil")]


def _distil(
    prompts: str, negative: str, cfg: float, width: float, height: float, steps: str, distilled_cfg: float,
    quality: str, seed: float, name: str, for_comfyui: bool,
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Begin, and tell until it has ended."""
    from .job import Job

    global _job
    try:
        request = Request(
            prompts=[line for line in prompts.splitlines() if line.strip()], negative_prompt=negative,
            cfg_scale=float(cfg), distilled_cfg_scale=float(distilled_cfg), width=int(width), height=int(height),
            steps=str(steps), quality=quality, seed=int(seed), name=name, for_comfyui=bool(for_comfyui),
        )  # fmt: skip
        _job = job = Job(request)
    except DodeError as error:
        yield str(error), None
        return
    worker = threading.Thread(target=job.run, name="D-ODE distilling", daemon=True)
    worker.start()
    while worker.is_alive():
        yield "\n".join([*job.lines, job.progress]), None
        time.sleep(_LOOK_SECONDS)
    yield "\n".join([*job.lines, _NEXT] if folders.is_listed(job.path) else job.lines), job.report


def _cancel() -> None:
    if _job is not None:
        _job.cancel()
