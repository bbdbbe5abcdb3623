"""From what a node is given to a λ table: made, or found where the same was made before; and saved."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy.model_patcher import ModelPatcher

from ....errors import DodeError, TableError
from ....fit.quality import START_SOLVER, Quality, start_schedule
from ....fit.recipe import Recipe
from ....fit.steps import parse_steps
from ....tables.describe import headlines
from .. import auto_table, table_files
from ..combinations import Combinations
from ..finished_fits import Fit
from ..graph_facts import GraphFacts
from ..guiders import Conditioning, Guider, guiders_for
from ..job import Distillation, Distilled, Request, Schedule, schedule, schedules_of
from ..messages import remark
from ..model_facts import check_teacher, is_flow
from ..prompts import check_empty, fitting_latent
from ..reporter import ProgressReporter
from ..run_row import is_applied
from .distill_options import AUTO, Expert


def combinations_for(
    guider: Guider | None,
    model: ModelPatcher | None,
    positive: Conditioning | None,
    negative: Conditioning | None,
    cfg: float,
    latent: dict[str, Any],
    seed: int,
    options: Expert,
) -> Combinations:
    """What the inputs of a node, and its options, bring together.

    Raises:
        DodeError: something is missing, or cannot serve.
    """
    guiders = _guiders(guider, model, positive, negative, cfg, options)
    teachers = _teachers(positive, negative, cfg, options)
    of = guiders[0].model_patcher
    for each in (latent, *options.latents_of):
        check_empty(of, each)
    if options.teacher_model is not None:
        check_teacher(options.teacher_model, of)
    return Combinations(
        guiders=guiders,
        teachers=teachers,
        latent=fitting_latent(of, latent),
        further=[fitting_latent(of, each) for each in options.latents_of],
        seed=seed,
        micro_batch=options.micro_batch,
    )


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
    if guider is not None and options.teacher_model is not None:
        raise DodeError(
            "connect model, positive and negative in place of the guider: teacher_model in Distill λ options takes the "
            "same prompts"
        )
    return [
        each
        for scale in _scales(cfg, options)
        for each in guiders_for(guider, model, _positives(positive, options), negative, scale)
    ]


def _teachers(
    positive: Conditioning | None, negative: Conditioning | None, cfg: float, options: Expert
) -> list[Guider]:
    """For each of the guiders the teacher's with the same prompt; none where the model is its own teacher."""
    if options.teacher_model is None:
        return []
    each = guiders_for(
        None, options.teacher_model, _positives(positive, options), negative, options.teacher_cfg
    )
    return each * len(_scales(cfg, options))


def _positives(positive: Conditioning | None, options: Expert) -> dict[str, Conditioning | None]:
    """By the names of their inputs."""
    return {"positive": positive} | {f"positive_{i}": each for i, each in enumerate(options.positives, 2)}


def _scales(cfg: float, options: Expert) -> list[float]:
    return list(dict.fromkeys([cfg, *options.cfgs]))


def request_for(combinations: Combinations, steps: str, quality: Quality, options: Expert) -> Request:
    """What Distill λ is asked for.

    Raises:
        DodeError: steps or schedules cannot be.
    """
    model = combinations.model
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
        refine_budget=options.budget(quality),
        settings={"scheduler": "sigmas" if own else scheduler},
        make_sigmas=None if own else schedules_of(model),
        or_stock=auto and options.solver == AUTO,
    )
    return Request(
        **combinations.parts,
        count=options.count(quality, len(combinations.guiders) * (1 + len(combinations.further))),
        schedules=schedules,
        recipe=recipe,
    )


def make_table(
    request: Request, *, redo: bool, prompt: Any, node_id: str | None, save_name: str
) -> tuple[Distilled, str]:
    """The table that is asked for, saved: made, or taken from where it was made before. With where it is.

    Args:
        redo: whether one that was made or begun before is made anew.
        prompt: the graph that runs, as ComfyUI hands it to the node.

    Raises:
        TableError: no table can be saved under this name; before any evaluation.
    """
    graph, stem = GraphFacts.of(prompt, node_id), table_files.place_for(save_name)
    if is_applied(request.model):
        remark(node_id, ["'Apply λ to model' has no effect here: distilling ignores λ"])
    fit = Fit.of(request, redo=redo)
    if not redo and (known := fit.find(node_id)) is not None:
        return _use(known, fit, stem, node_id)
    return _save(_distil(fit, graph, save_name, node_id), fit, stem, node_id)


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
    remark(node_id, (), "; ".join([used, *headlines(known.table)]))
    return replace(known, table=replace(known.table, name=place.stem)), f"Saved before as {place}"


def _save(distilled: Distilled, fit: Fit, stem: Path, node_id: str | None) -> tuple[Distilled, str]:
    """Save the table; whatever comes of it, the node still gives its outputs. With its name, and where it is."""
    saved = table_files.save_if_possible(distilled.table, stem)
    remarks = [*saved.remarks, *distilled.remarks]
    if saved.place is not None:
        fit.finish(distilled, saved.place)
        if not remarks:
            told = [f"saved as {saved.place.name}", *headlines(distilled.table), *fit.remarks]
            remark(node_id, (), "; ".join(told))
        elif not saved.remarks:
            remarks.insert(0, f"saved as {saved.place.name}")
    for line in fit.remarks:
        logging.info("D-ODE: %s", line)
    remark(node_id, [*remarks, *fit.remarks] if remarks else [])
    return replace(distilled, table=saved.table), saved.where


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
