"""The node that makes λ tables."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ....errors import DodeError, TableError
from ....fit.pipeline import Recipe
from ....fit.teacher import Teacher
from ....tables import plots
from ....tables.describe import headlines, table_text
from ....tables.row import PREDICTIONS
from .. import auto_table, pins, table_files
from ..graph_facts import GraphFacts
from ..guiders import Conditioning, Guider, guiders_for
from ..host_samplers import student_names, teacher_names
from ..job import Distillation, Distilled, Request, Schedule, parse_steps, schedule, schedules_of
from ..messages import remark, show_text
from ..pictures import draw
from ..prompts import check_empty, fitting_latent
from ..reporter import ProgressReporter
from ..run_row import is_applied
from .distill_options import NO_RANGE, Options, Range
from .inputs import CATEGORY, Table, cfg_input, conditioning_inputs, guider_input, save_name_input, seed_input

AUTO = "auto"
"""Distil for both predictions and keep the one with the smaller held-out error."""


class DistillLambdas(io.ComfyNode):
    """Distil λ for this model, prompt and size, and save the table."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        more_positives = [
            io.Conditioning.Input(
                f"positive_{i}",
                optional=True,
                tooltip="Another prompt. All prompts get an equal share of the latents, so that λ is not fitted "
                "to a single picture.",
            )
            for i in (2, 3, 4)
        ]
        return io.Schema(
            node_id="DODE_DistillLambdas",
            display_name="Distill λ",
            category=CATEGORY,
            description="Makes a λ table for this model. Runs a many-step teacher and a few-step student once, "
            "finds one λ per network evaluation by least squares, and saves the table. With a refine_budget, "
            "it then fits the whole solver to the teacher's results.",
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
                io.Int.Input(
                    "latents",
                    default=16,
                    min=2,
                    max=1024,
                    tooltip="How many noises to distil on. A quarter of them is held out to check λ. More take "
                    "longer, and λ fits new noises better.",
                ),
                seed_input("Seed of the noises. If you change it, the node distils again.", changes=False),
                io.Combo.Input(
                    "solver",
                    options=student_names(),
                    default="euler",
                    tooltip="The few-step sampler to improve. Only samplers that can be distilled are listed.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="karras",
                    tooltip="The σ schedule of the student. Ignored if sigmas are connected.",
                ),
                io.String.Input(
                    "steps",
                    default="5, 6, 8, 10",
                    tooltip="The student's steps: one number or several, such as 5, 6, 8 or 2-12. The teacher runs only "
                    "once for all of them. Ignored if sigmas are connected.",
                ),
                io.Int.Input(
                    "scale",
                    default=10,
                    min=1,
                    max=100,
                    tooltip="Teacher steps per student step (C in the paper). The teacher is most of the work.",
                ),
                io.Combo.Input(
                    "teacher",
                    options=teacher_names(),
                    default="dpmpp_2m",
                    tooltip="The sampler to follow. It runs with many steps.",
                ),
                io.Combo.Input(
                    "prediction",
                    options=[AUTO, *PREDICTIONS],
                    default=AUTO,
                    tooltip="What λ corrects: the predicted noise, or the predicted picture (data). auto tries "
                    "both and keeps the one with the smaller held-out error.",
                ),
                io.Int.Input(
                    "micro_batch",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="How many latents to evaluate at once. λ stays the same. 0 uses as many as fit into memory "
                    "by ComfyUI's own estimate. If memory runs out, the node goes on with half as many.",
                ),
                save_name_input(),
                *more_positives,
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Your own schedule for the student, in place of scheduler and steps. It must end at 0.",
                ),
                io.Float.Input(  # the last widget: a saved graph holds its values by their place
                    "refine_budget",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    optional=True,
                    tooltip="Refining fits the whole few-step solver, weights and σ, to the teacher's last state. "
                    "The budget is a multiple of the teacher's cost: at 4, the fit may take four times as long as "
                    "the teacher. It sets how many latents and iterations are used. 0 = off.",
                ),
                guider_input(),
                Options.Input(
                    "options",
                    optional=True,
                    tooltip="Further cfgs and sizes that the table is to be good for, from Distill λ options.",
                ),
            ],
            outputs=[
                Table.Output("table", display_name="table", tooltip="The λ table, as saved."),
                io.Image.Output(
                    "report",
                    display_name="report",
                    tooltip="λ over σ, and the error after each step compared with stock. For refined rows: σ and "
                    "the error at each stage.",
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
                    tooltip="The stock solver's result on the held-out latents, with the same steps.",
                ),
                io.String.Output(
                    "summary", display_name="summary", tooltip="The table in words and numbers."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
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
        model: ModelPatcher | None = None,
        positive: Conditioning | None = None,
        negative: Conditioning | None = None,
        positive_2: Conditioning | None = None,
        positive_3: Conditioning | None = None,
        positive_4: Conditioning | None = None,
        sigmas: torch.Tensor | None = None,
        refine_budget: float = 0.0,
        guider: Guider | None = None,
        options: Range = NO_RANGE,
    ) -> io.NodeOutput:
        """Distil, save, report."""
        positives = {
            "positive": positive, "positive_2": positive_2, "positive_3": positive_3, "positive_4": positive_4,
        }  # fmt: skip
        if guider is not None and options.cfgs:
            raise DodeError(
                "empty cfgs in Distill λ options, or disconnect the guider: it has a cfg of its own"
            )
        guiders = [
            each
            for scale in dict.fromkeys([cfg, *options.cfgs])
            for each in guiders_for(guider, model, positives, negative, scale)
        ]
        model = guiders[0].model_patcher
        for each in (latent, *options.latents):
            check_empty(model, each)
        node_id = cls.hidden.unique_id
        stem = table_files.place_for(save_name)
        graph = GraphFacts.of(cls.hidden.prompt, node_id)
        if is_applied(model):
            remark(node_id, ["'Apply λ to model' has no effect here: distilling ignores λ"])
        schedules = (
            [schedule(model, solver, scheduler, n) for n in parse_steps(steps)]
            if sigmas is None
            else [Schedule(sigmas.cpu(), None)]
        )
        recipe = Recipe(
            solvers=[solver],
            predictions=PREDICTIONS if prediction == AUTO else [prediction],
            teacher=Teacher(teacher, scale),
            refine_budget=refine_budget,
            settings={"scheduler": scheduler if sigmas is None else "sigmas"},
            make_sigmas=schedules_of(model) if sigmas is None else None,
        )
        request = Request(
            guiders=guiders,
            latent=fitting_latent(model, latent),
            latents=latents,
            seed=seed,
            schedules=schedules,
            recipe=recipe,
            micro_batch=micro_batch,
            further=[fitting_latent(model, each) for each in options.latents],
        )
        with ProgressReporter(model, request.latent, node_id) as reporter:
            distillation = Distillation(request, reporter)
            try:
                distilled = distillation.run()
            except BaseException:
                _save_what_there_is(distillation, graph, save_name, node_id)
                raise
        auto_table.keep(distilled.table)
        distilled, saved = _save(replace(distilled, table=graph.on(distilled.table)), stem, node_id)
        pins.note(cls, distilled.table)
        report = draw(plots.report_figure, distilled.table)
        return io.NodeOutput(
            distilled.table,
            report,
            {"samples": distilled.teacher},
            {"samples": distilled.dode},
            {"samples": distilled.stock},
            f"{saved}\n\n{table_text(distilled.table)}",
            ui=ui.PreviewImage(report, cls=cls),
        )


def _save(distilled: Distilled, stem: Path, node_id: str | None) -> tuple[Distilled, str]:
    """Save the table; whatever comes of it, the node still gives its outputs. With its name, and where it "
    "is."""
    remarks = list(distilled.remarks)
    try:
        place = table_files.save(distilled.table, stem)
    except TableError as error:
        remark(node_id, [f"not saved, so use the table before you close ComfyUI: {error}", *remarks])
        return distilled, f"Not saved: {error}"
    if place.parent != stem.parent:
        remarks.insert(0, f"could not write to {stem.parent}: the table is saved as {place} instead")
    elif remarks:
        remarks.insert(0, f"saved as {place.name}")
    else:
        show_text(node_id, "; ".join([f"saved as {place.name}", *headlines(distilled.table)]))
    remark(node_id, remarks)
    return replace(distilled, table=replace(distilled.table, name=place.stem)), f"Saved as {place}"


def _save_what_there_is(
    distillation: Distillation, graph: GraphFacts, save_name: str, node_id: str | None
) -> None:
    """Save the rows of a distillation that was ended; nothing of that may hide why it was ended."""
    try:
        table = distillation.table()
        if table is not None:
            table = graph.on(table, hashes=False)
            auto_table.keep(table)
            path = table_files.save(table, table_files.place_for(save_name, "-partial"))
            remark(
                node_id,
                [f"stopped early; the rows found so far are saved as {path.name}: {table.contents()}"],
            )
    except Exception:
        logging.exception("D-ODE: the rows found so far could not be saved")
