"""The node that makes λ tables."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ....errors import DodeError, TableError
from ....fit.pipeline import Recipe
from ....fit.quality import GOOD, QUALITIES, START_SOLVER, Quality, quality_of, start_schedule
from ....fit.steps import parse_steps
from ....tables import plots
from ....tables.describe import headlines, table_text
from .. import auto_table, pins, table_files
from ..finished_fits import Fit
from ..graph_facts import GraphFacts
from ..guiders import Conditioning, Guider, guiders_for
from ..job import Distillation, Distilled, Request, Schedule, schedule, schedules_of
from ..messages import remark, show_text
from ..model_facts import is_flow
from ..pictures import draw
from ..prompts import check_empty, fitting_latent
from ..reporter import ProgressReporter
from ..run_row import is_applied
from .distill_options import AUTO, USUAL, Expert, Options
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
        graph = GraphFacts.of(cls.hidden.prompt, node_id)
        remark(node_id, _gone(cls.hidden.prompt, node_id))
        request = _request(
            guiders=_guiders(guider, model, positive, negative, cfg, options),
            latent=latent, steps=steps, quality=quality_of(quality), seed=seed, options=options,
        )  # fmt: skip
        model = request.model
        stem = table_files.place_for(save_name)
        if is_applied(model):
            remark(node_id, ["'Apply λ to model' has no effect here: distilling ignores λ"])
        fit = Fit.of(request, redo=options.redo)
        if not options.redo and (known := fit.find(node_id)) is not None:
            distilled, saved = _use(known, fit, stem, node_id)
        else:
            distilled, saved = _save(_distil(fit, graph, save_name, node_id), fit, stem, node_id)
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


def _guiders(
    guider: Guider | None,
    model: ModelPatcher | None,
    positive: Conditioning | None,
    negative: Conditioning | None,
    cfg: float,
    options: Expert,
) -> list[Guider]:
    """One for each prompt at each guidance."""
    if guider is not None and options.cfgs:
        raise DodeError("empty cfgs in Distill λ options, or disconnect the guider: it has a cfg of its own")
    further = {f"positive_{i}": each for i, each in enumerate(options.positives, 2)}
    positives = {"positive": positive} | further
    return [
        each
        for scale in dict.fromkeys([cfg, *options.cfgs])
        for each in guiders_for(guider, model, positives, negative, scale)
    ]


def _request(
    guiders: list[Guider], latent: dict[str, Any], steps: str, quality: Quality, seed: int, options: Expert
) -> Request:
    """What the inputs ask for."""
    model = guiders[0].model_patcher
    for each in (latent, *options.latents_of):
        check_empty(model, each)
    auto = options.scheduler == AUTO
    scheduler = start_schedule(flow=is_flow(model)) if auto else options.scheduler
    solver = START_SOLVER if options.solver == AUTO else options.solver
    own = options.sigmas is not None
    schedules = (
        [Schedule(options.sigmas, None)]
        if options.sigmas is not None
        else [schedule(model, solver, scheduler, n) for n in parse_steps(steps)]
    )
    recipe = Recipe(
        solvers=[solver],
        predictions=options.predictions,
        teacher=options.teacher,
        refine_budget=options.budget(quality, len(schedules)),
        settings={"scheduler": "sigmas" if own else scheduler},
        make_sigmas=None if own else schedules_of(model),
        or_stock=auto and options.solver == AUTO,
    )
    return Request(
        guiders=guiders,
        latent=fitting_latent(model, latent),
        latents=options.count(quality, len(guiders) * (1 + len(options.latents_of))),
        seed=seed,
        schedules=schedules,
        recipe=recipe,
        micro_batch=options.micro_batch,
        further=[fitting_latent(model, each) for each in options.latents_of],
    )


def _distil(fit: Fit, graph: GraphFacts, save_name: str, node_id: str | None) -> Distilled:
    """Fit; what there is by then is saved if that is ended."""
    request = fit.request
    with ProgressReporter(request.model, request.latent, node_id) as reporter:
        distillation = Distillation(request, reporter, fit.work)
        try:
            distilled = distillation.run()
        except BaseException:
            _save_what_there_is(distillation, graph, save_name, node_id)
            raise
    auto_table.keep(distilled.table)
    return replace(distilled, table=graph.on(distilled.table))


def _use(known: Distilled, fit: Fit, stem: Path, node_id: str | None) -> tuple[Distilled, str]:
    """The table that the same fit has come to before, under the name that is asked for now. With where it is."""
    place = table_files.saved_as(known.table, stem)
    if place is None:
        try:
            place = table_files.save(known.table, stem)
        except TableError as error:
            remark(node_id, [f"this was fitted before: {known.table.name} is used. Not saved again: {error}"])
            return known, f"Saved before as {known.table.name}. Not saved again: {error}"
        fit.finish(known, place)
    used = f"this was fitted before: {place.name} is used. To fit it again, set redo in 'Distill λ options'"
    logging.info("D-ODE: %s", used)
    show_text(node_id, "; ".join([used, *headlines(known.table)]))
    return replace(known, table=replace(known.table, name=place.stem)), f"Saved before as {place}"


def _save(distilled: Distilled, fit: Fit, stem: Path, node_id: str | None) -> tuple[Distilled, str]:
    """Save the table; whatever comes of it, the node still gives its outputs. With its name, and where it is."""
    remarks = list(distilled.remarks)
    try:
        place = table_files.save(distilled.table, stem)
    except TableError as error:
        remark(node_id, [f"not saved, so use the table before you close ComfyUI: {error}", *remarks])
        return distilled, f"Not saved: {error}"
    fit.finish(distilled, place)
    if place.parent != stem.parent:
        remarks.insert(0, f"could not write to {stem.parent}: the table is saved as {place} instead")
    elif remarks:
        remarks.insert(0, f"saved as {place.name}")
    else:
        show_text(node_id, "; ".join([f"saved as {place.name}", *headlines(distilled.table), *fit.remarks]))
    for line in fit.remarks:
        logging.info("D-ODE: %s", line)
    remark(node_id, [*remarks, *fit.remarks] if remarks else [])
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
