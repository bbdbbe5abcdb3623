"""What the node 'Find best stock sampler' does: a teacher, and a race of stock settings, as ComfyUI samples."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import torch

from ...errors import DodeError
from ...fit.progress import Progress, Reporter
from ...fit.stock import Found, StockSearch
from ...fit.teacher import plan_teacher
from ...sampling.solvers import resolve
from .job import Distillation, Request
from .model_facts import is_flow


def find_stock(request: Request, reporter: Reporter) -> Found:
    """The best stock setting for the request's first schedule's number of steps.

    Args:
        request: of its recipe the teacher, the solvers and the schedules count.
        reporter: told what it will cost, then of every evaluation.

    Raises:
        DodeError: as a distillation does.
    """
    work, (schedule, *_), recipe = Distillation(request, reporter), request.schedules, request.recipe
    if recipe.make_sigmas is None:
        raise DodeError("there are no schedules to look among")
    latents = work.latents_for(schedule.sigmas, request.count)
    teacher = replace(recipe.teacher, flow=is_flow(request.model))
    planned = plan_teacher(latents, [schedule.sigmas], teacher, solvers=recipe.solvers)
    search = StockSearch(planned, len(schedule.sigmas) - 1, schedule.sigmas, recipe.make_sigmas)
    costs = work.checking_cost(latents), planned.cost, search.cost
    reporter.begin(
        f"at most {sum(costs)} evaluations: {costs[0]} to check the model, {costs[1]} of the slow sampler, "
        f"{costs[2]} of stock settings"
    )
    with Progress(sum(costs), reporter) as progress:
        trying, teaching, searching = progress.split(*costs)
        work.check_model(latents, trying)
        return search(planned(teaching), searching)


def as_host_runs(found: Found) -> tuple[comfy.samplers.KSAMPLER, torch.Tensor]:
    """The best setting as SAMPLER and SIGMAS."""
    best = found.best
    sampler = comfy.samplers.KSAMPLER(resolve(best.solver), dict(best.options))
    return sampler, torch.tensor(best.student.sigmas, dtype=torch.float32)
