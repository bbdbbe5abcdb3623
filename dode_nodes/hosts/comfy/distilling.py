"""What the node 'Distill λ' does: one teacher run, a student per number of steps, the better prediction."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ...distill import distill
from ...errors import DodeError
from ...groups import Evaluator, Group, held_out, micro_batches
from ...probe import probe_student
from ...sample import sample_dode
from ...solvers import resolve
from ...table import LambdaRow, LambdaTable, end_error
from ...teacher import Targets, run_teacher
from .facts import is_flow, model_facts
from .session import (
    Conditioning,
    ProgressReporter,
    Prompt,
    initial_states,
    micro_batch_that_fits,
    noise_per_latent,
    one_prompt_per_row,
    with_prompts,
)

AUTO = "auto"
"""Distil for both predictions and keep the one with the smaller held-out error."""


@dataclass(frozen=True)
class Request:
    """What to distil.

    Attributes:
        conditionings: the positives, each taking an equal share of the latents.
        latent: an empty latent of the size to distil at, ``[1, C, *spatial]``.
        latents: how many noises to draw from ``seed``.
        schedules: the students' sigmas.
        micro_batch: latents evaluated at a time; 0 for what fits.
    """

    model: ModelPatcher
    conditionings: Sequence[Conditioning]
    negative: Conditioning
    cfg: float
    latent: torch.Tensor
    latents: int
    seed: int
    solver: str
    schedules: Sequence[torch.Tensor]
    schedule_name: str
    scale: int
    teacher: str
    prediction: str
    micro_batch: int


@dataclass(frozen=True)
class Distilled:
    """The table, and the held-out latents by teacher, D-ODE and stock solver over the first schedule."""

    table: LambdaTable
    teacher: torch.Tensor
    dode: torch.Tensor
    stock: torch.Tensor


def parse_steps(text: str) -> list[int]:
    """ "5, 6, 8" as numbers, without repetition.

    Raises:
        DodeError: it holds something else.
    """
    parts = [part for part in re.split(r"[,;\s]+", text.strip()) if part]
    if not parts or not all(part.isdecimal() and 1 <= int(part) <= 1000 for part in parts):
        raise DodeError(f"steps must be a number or several, such as '5, 6, 8, 10', not '{text}'")
    return list(dict.fromkeys(int(part) for part in parts))


def schedule(model: ModelPatcher, solver: str, scheduler: str, steps: int) -> torch.Tensor:
    """The σ of a KSampler with these settings, on the CPU."""
    return comfy.samplers.KSampler(
        model, steps, "cpu", sampler=solver, scheduler=scheduler, denoise=1.0
    ).sigmas


def run(request: Request, reporter: ProgressReporter) -> Distilled:
    """Distil inside ComfyUI's sampling path."""
    prompts = [
        pair for positive in request.conditionings for pair in one_prompt_per_row(positive, request.negative)
    ]
    if request.latents < max(2, len(prompts)):
        raise DodeError(
            f"{len(prompts)} prompts need at least {max(2, len(prompts))} latents, got {request.latents}: "
            "some are kept to check λ on"
        )
    size = request.micro_batch or micro_batch_that_fits(request.model, request.latent.shape, request.latents)
    size = min(size, request.latents)
    noise = noise_per_latent(request.latent, request.seed, request.latents)
    longest = max(request.schedules, key=len)
    results: list[Distilled] = []

    def inside(denoisers: list[Prompt]) -> None:
        x = initial_states(request.model, noise, longest[0])
        groups = [
            Group(prompt.denoiser, share, prompt.extra_args)
            for prompt, share in zip(denoisers, x.tensor_split(len(denoisers)), strict=True)
        ]
        results.append(_distil(request, groups, size, reporter))

    batch = request.latent[:1].expand(size, *request.latent.shape[1:]).clone()
    with_prompts(request.model, prompts, request.cfg, batch, longest, request.seed, inside)
    return results[0]


def _distil(request: Request, groups: list[Group], size: int, reporter: ProgressReporter) -> Distilled:
    device = groups[0].x.device
    schedules = [sigmas.to(device) for sigmas in request.schedules]
    predictions = ["noise", "data"] if request.prediction == AUTO else [request.prediction]
    costs = [_student_cost(request, groups, sigmas) for sigmas in schedules for _ in predictions]
    first = probe_student(resolve(request.solver), schedules[0], model=groups[0].model)
    results_cost = _results_cost(groups, len(first.sigmas))
    reporter.later = sum(costs) + results_cost
    targets = run_teacher(
        groups,
        None,
        schedules,
        solvers=request.solver,
        teacher=request.teacher,
        scale=request.scale,
        micro_batch=size,
        flow=is_flow(request.model),
        progress=reporter,
    )
    rows = []
    for sigmas in schedules:
        candidates = []
        for prediction in predictions:
            reporter.next_run()
            reporter.later -= costs.pop(0)
            candidates.append(
                distill(
                    groups,
                    None,
                    sigmas,
                    solver=request.solver,
                    prediction=prediction,
                    targets=targets,
                    micro_batch=size,
                    settings=_settings(request, len(groups)),
                    progress=reporter,
                )
            )
        rows.append(min(candidates, key=end_error))
    table = LambdaTable(rows, model=model_facts(request.model))
    reporter.next_run()
    reporter.later = 0
    return Distilled(
        table, *_held_out_results(request, groups, targets, rows[0], schedules[0], size, reporter)
    )


def _student_cost(request: Request, groups: list[Group], sigmas: torch.Tensor) -> int:
    queries = probe_student(resolve(request.solver), sigmas, model=groups[0].model)
    return len(queries.sigmas) * (request.latents + len(held_out(groups)))


def _results_cost(groups: list[Group], evaluations: int) -> int:
    return 2 * evaluations * len(held_out(groups))


def _settings(request: Request, prompts: int) -> dict[str, Any]:
    return {
        "cfg": request.cfg,
        "seed": request.seed,
        "scheduler": request.schedule_name,
        "prompts": prompts,
        "host": "ComfyUI",
    }


def _held_out_results(
    request: Request,
    groups: list[Group],
    targets: Targets,
    row: LambdaRow,
    sigmas: torch.Tensor,
    size: int,
    reporter: ProgressReporter,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The held-out latents by teacher, D-ODE and stock solver, as ComfyUI passes latents on."""
    held = held_out(groups)
    evaluator = Evaluator(reporter, total=_results_cost(groups, row.nfe))
    dode, stock = [], []
    for batch in micro_batches(groups, size, held):
        for results, options in ((dode, {"row": row}), (stock, {"solver": row.solver})):
            model = evaluator.on(batch, "results to look at")
            results.append(
                sample_dode(model, batch.x, sigmas, batch.extra_args(), disable=True, **options).cpu()
            )
    process = request.model.model.process_latent_out
    return tuple(process(x.float()) for x in (targets.at(0.0)[held], torch.cat(dode), torch.cat(stock)))
