"""The node that makes λ tables."""

from __future__ import annotations

import logging
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ... import plots
from ...describe import table_text
from . import samplers, tables
from .common import CATEGORY, Table, cfg_input, conditioning_inputs, seed_input
from .distilling import AUTO, Distillation, Request, parse_steps, schedule
from .messages import remark, show_text
from .pictures import draw
from .sampling import is_applied
from .session import Conditioning, ProgressReporter, check_empty


class DistillLambdas(io.ComfyNode):
    """Distil λ for this model, prompt and size, and save the table."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        more_positives = [
            io.Conditioning.Input(
                f"positive_{i}",
                optional=True,
                tooltip="Another prompt. Each takes an equal share of the latents, so that λ is not "
                "fitted to one picture.",
            )
            for i in (2, 3, 4)
        ]
        return io.Schema(
            node_id="DODE_DistillLambdas",
            display_name="Distill λ",
            category=CATEGORY,
            description="Runs a many-step teacher and a few-step student once, finds one λ per network "
            "evaluation by least squares, and saves the λ table for this model. With a refine_budget it then "
            "fits the whole solver to the teacher's results.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model to distil for, with its LoRAs and patches."),
                *conditioning_inputs(),
                cfg_input(),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty latent of the size you will sample at. λ is fitted from pure noise, "
                    "so a filled latent or a mask is an error; its batch size is not used.",
                ),
                io.Int.Input(
                    "latents",
                    default=16,
                    min=2,
                    max=1024,
                    tooltip="How many noises to distil on. A quarter of them is not fitted on but used to "
                    "check λ. More take longer and generalise better.",
                ),
                seed_input("Seed of the noises. It stays: a new one would distil again.", changes=False),
                io.Combo.Input(
                    "solver",
                    options=samplers.student_names(),
                    default="euler",
                    tooltip="The few-step sampler to improve: every deterministic one this ComfyUI has.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="karras",
                    tooltip="The σ schedule of the student. Not used where sigmas are connected.",
                ),
                io.String.Input(
                    "steps",
                    default="5, 6, 8, 10",
                    tooltip="The student's steps: one number or several. One teacher run serves them all. "
                    "Not used where sigmas are connected.",
                ),
                io.Int.Input(
                    "scale",
                    default=10,
                    min=1,
                    max=100,
                    tooltip="Teacher steps per student step (the paper's C). The teacher is most of the work.",
                ),
                io.Combo.Input(
                    "teacher",
                    options=samplers.teacher_names(),
                    default="dpmpp_2m",
                    tooltip="The sampler to follow, with many steps.",
                ),
                io.Combo.Input(
                    "prediction",
                    options=[AUTO, "noise", "data"],
                    default=AUTO,
                    tooltip="Correct the predicted noise or the predicted picture. auto distils both and "
                    "keeps the better, on latents that λ was not fitted on.",
                ),
                io.Int.Input(
                    "micro_batch",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="How many latents to evaluate at a time; the λ are the same. 0 takes what "
                    "fits into memory by ComfyUI's own estimate. Lower it if memory runs out.",
                ),
                io.String.Input(
                    "save_name",
                    default="my_model",
                    tooltip="File name of the table, in the lambdas folder. A taken name gets _00001.",
                ),
                *more_positives,
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="A schedule of your own for the student, ending at 0, instead of scheduler and steps.",
                ),
                io.Float.Input(  # the last widget: a saved graph holds its values by their place
                    "refine_budget",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    optional=True,
                    tooltip="Refine: fit the whole few-step solver, weights and σ, to the teacher's last state. "
                    "A multiple of the teacher's cost: at 4, refining may take four times as long as the "
                    "teacher, and from that follow its latents and iterations. 0 = off.",
                ),
            ],
            outputs=[
                Table.Output("table", display_name="table", tooltip="The λ table, as saved."),
                io.Image.Output(
                    "report",
                    display_name="report",
                    tooltip="λ over σ, and the error per step against stock; of refined rows their σ, and the "
                    "error stage by stage.",
                ),
                io.Latent.Output(
                    "teacher_latents",
                    display_name="teacher",
                    tooltip="The teacher's result on the latents that λ was not fitted on.",
                ),
                io.Latent.Output(
                    "dode_latents",
                    display_name="D-ODE",
                    tooltip="The D-ODE solver's result on them, with the first number of steps and its best row.",
                ),
                io.Latent.Output(
                    "stock_latents",
                    display_name="stock",
                    tooltip="The stock solver's result on them, with the same steps.",
                ),
                io.String.Output(
                    "summary", display_name="summary", tooltip="The table in words and numbers."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: Conditioning,
        negative: Conditioning,
        cfg: float,
        latent: dict[str, Any],
        latents: int,
        seed: int,
        solver: str,
        scheduler: str,
        steps: str,
        scale: int,
        teacher: str,
        prediction: str,
        micro_batch: int,
        save_name: str,
        positive_2: Conditioning | None = None,
        positive_3: Conditioning | None = None,
        positive_4: Conditioning | None = None,
        sigmas: torch.Tensor | None = None,
        refine_budget: float = 0.0,
    ) -> io.NodeOutput:
        """Distil, save, report."""
        check_empty(latent)
        node_id = cls.hidden.unique_id
        path = tables.free_path(save_name)
        if is_applied(model):
            remark(node_id, ["this model has λ applied; they are left out while distilling"])
        schedules = (
            [schedule(model, solver, scheduler, n) for n in parse_steps(steps)]
            if sigmas is None
            else [sigmas.cpu()]
        )
        given = [positive, positive_2, positive_3, positive_4]
        request = Request(
            model=model,
            conditionings=[conditioning for conditioning in given if conditioning is not None],
            negative=negative,
            cfg=cfg,
            latent=comfy.sample.fix_empty_latent_channels(model, latent["samples"]),
            latents=latents,
            seed=seed,
            solver=solver,
            schedules=schedules,
            schedule_name=scheduler if sigmas is None else "sigmas",
            scale=scale,
            teacher=teacher,
            prediction=prediction,
            refine_budget=refine_budget,
            micro_batch=micro_batch,
        )
        with ProgressReporter(model, node_id) as reporter:
            distillation = Distillation(request, reporter)
            try:
                distilled = distillation.run()
            except BaseException:
                _save_what_there_is(distillation, save_name, node_id)
                raise
        distilled.table.save(path)
        show_text(node_id, f"saved as {path.name}")
        report = draw(plots.report_figure, distilled.table)
        return io.NodeOutput(
            distilled.table,
            report,
            {"samples": distilled.teacher},
            {"samples": distilled.dode},
            {"samples": distilled.stock},
            f"Saved as {path}\n\n{table_text(distilled.table)}",
            ui=ui.PreviewImage(report, cls=cls),
        )


def _save_what_there_is(distillation: Distillation, save_name: str, node_id: str | None) -> None:
    """Save the rows of a distillation that was ended; nothing of that may hide why it was ended."""
    try:
        table = distillation.table()
        if table is not None:
            path = table.save(tables.free_path(save_name, "-partial"))
            remark(node_id, [f"ended early; the table so far is saved as {path.name}: {table.contents()}"])
    except Exception:
        logging.exception("D-ODE: what was found before the end could not be saved")
