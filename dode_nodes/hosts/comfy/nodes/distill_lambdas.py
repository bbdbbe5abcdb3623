"""The node that makes λ tables."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ....fit.quality import GOOD, QUALITIES, quality_of
from ....tables import plots
from ....tables.describe import table_text
from .. import pins
from ..guiders import Conditioning, Guider
from ..messages import remark
from ..pictures import draw
from .distill_options import USUAL, Expert, Options
from .inputs import (
    CATEGORY,
    Table,
    cfg_input,
    conditioning_inputs,
    guider_input,
    save_name_input,
    schema,
    seed_input,
)
from .made_table import combinations_for, make_table, request_for


class DistillLambdas(io.ComfyNode):
    """Distil λ for this model, prompt and size, and save the table."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            node_id="DODE_DistillLambdas",
            display_name="Distill λ",
            category=CATEGORY,
            description="Makes a λ table: a few-step sampler for this model that ends where a slow one ends. The slow "
            "sampler (the teacher) runs once, a few-step solver is fitted to it, and the table is saved.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                io.Model.Input(
                    "model", optional=True, tooltip="The model, with the LoRAs and patches you sample with."
                ),
                *conditioning_inputs(optional=True),
                cfg_input(guider=True),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty latent of the size you sample at. λ is fitted from pure noise, so a picture or "
                    "a mask gives an error. The batch size has no effect.",
                ),
                io.String.Input(
                    "steps",
                    default="6",
                    tooltip="The steps you want to sample with: one number or several, such as 5, 6, 8 or 2-12. The "
                    "slow sampler runs only once for all of them.",
                ),
                io.Combo.Input(
                    "quality",
                    options=list(QUALITIES),
                    default=GOOD,
                    tooltip="How much work it may be. "
                    + ". ".join(f"{name}: {quality.words}" for name, quality in QUALITIES.items())
                    + ". What it will cost is said before it starts.",
                ),
                seed_input("Seed of the noises. If you change it, the node distils again.", changes=False),
                save_name_input(),
                guider_input(),
                Options.Input(
                    "options",
                    optional=True,
                    tooltip="More prompts, cfgs and sizes, and how the fit works, from Distill λ options.",
                ),
            ],
            outputs=[
                Table.Output("table", display_name="table", tooltip="The λ table, as saved."),
                io.Image.Output(
                    "report",
                    display_name="report",
                    tooltip="How far the best stock sampler and D-ODE end from the slow sampler. Below: λ over σ, "
                    "and the error after each step; for refined rows σ, and the error at each stage.",
                ),
                io.Latent.Output(
                    "teacher_latents",
                    display_name="teacher",
                    tooltip="The teacher's result on the held-out latents.",
                ),
                io.Latent.Output(
                    "dode_latents",
                    display_name="D-ODE",
                    tooltip="The D-ODE result on the held-out latents: the best row for the first number in steps.",
                ),
                io.Latent.Output(
                    "stock_latents",
                    display_name="stock",
                    tooltip="The best stock setting's result on the held-out latents, with as many evaluations; "
                    "the summary says which setting.",
                ),
                io.String.Output(
                    "summary", display_name="summary", tooltip="The table in words and numbers."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, quality: Any = GOOD) -> bool | str:
        """A graph of an earlier version holds other inputs in these places; ComfyUI asks before anything runs."""
        if quality is None or quality in QUALITIES:  # None: what is linked
            return True
        return (
            f"choose a quality, {', '.join(QUALITIES)}, and look at cfg, steps and save_name: this graph was saved with "
            f"an earlier version of this node. {', '.join(_NOW_OPTIONS)} and further prompts are inputs of "
            "'Distill λ options' now"
        )

    @classmethod
    def execute(
        cls,
        cfg: float,
        latent: dict[str, Any],
        steps: str,
        quality: str,
        seed: int,
        save_name: str,
        model: ModelPatcher | None = None,
        positive: Conditioning | None = None,
        negative: Conditioning | None = None,
        guider: Guider | None = None,
        options: Expert = USUAL,
    ) -> io.NodeOutput:
        """Distil, save, report."""
        node_id = cls.hidden.unique_id
        remark(node_id, _gone(cls.hidden.prompt, node_id))
        combinations = combinations_for(guider, model, positive, negative, cfg, latent, seed, options)
        distilled, saved = make_table(
            request_for(combinations, steps, quality_of(quality), options),
            redo=options.redo, prompt=cls.hidden.prompt, node_id=node_id, save_name=save_name,
        )  # fmt: skip
        pins.note(cls, distilled.table)
        report = draw(plots.report_figure, distilled.table)
        return io.NodeOutput(
            distilled.table,
            report,
            {"samples": distilled.teacher},
            {"samples": distilled.dode},
            {"samples": distilled.stock},
            f"{saved}\n\nThe stock latents: {distilled.opponent}\n\n{table_text(distilled.table)}",
            ui=ui.PreviewImage(report, cls=cls),
        )


_NOW_OPTIONS = (
    "latents", "solver", "scheduler", "scale", "teacher", "prediction", "micro_batch", "refine_budget", "sigmas",
)  # fmt: skip
"""Inputs that this node had once, beside further prompts."""
_FURTHER_PROMPTS = ("positive_2", "positive_3", "positive_4")


def _gone(prompt: Any, node_id: str | None) -> list[str]:
    """That inputs of an earlier version, which ComfyUI passes over, have no effect."""
    inputs = ((prompt or {}).get(node_id) or {}).get("inputs", {})
    gone = [name for name in (*_NOW_OPTIONS, *_FURTHER_PROMPTS) if name in inputs]
    if not gone:
        return []
    return [f"set {', '.join(gone)} on 'Distill λ options': here they have no effect any more"]
