"""What the node 'Distill λ' does: the pipeline from latents to rows, inside ComfyUI's sampling path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher

from ...denoiser import PREDICTIONS
from ...errors import DodeError
from ...groups import Evaluator, Group, held_out, in_order, micro_batches
from ...pipeline import Pipeline
from ...probe import probe_student
from ...sample import sample_dode
from ...solvers import resolve
from ...table import LambdaRow, LambdaTable, end_error
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
        refine_budget: what refining may cost, as a multiple of the teacher's evaluations; 0 for none.
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
    refine_budget: float
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


class Distillation:
    """A request on its way to a table.

    Raises:
        DodeError: there are fewer latents than prompts.
    """

    def __init__(self, request: Request, reporter: ProgressReporter) -> None:
        self._request = request
        self._reporter = reporter
        self._prompts = [
            pair
            for positive in request.conditionings
            for pair in one_prompt_per_row(positive, request.negative)
        ]
        fewest = max(2, len(self._prompts))
        if request.latents < fewest:
            raise DodeError(
                f"{len(self._prompts)} prompts need at least {fewest} latents, got {request.latents}: "
                "some are kept to check λ on"
            )
        self._pipeline: Pipeline | None = None

    def run(self) -> Distilled:
        """All of it, inside ComfyUI's sampling path."""
        request = self._request
        size = request.micro_batch or micro_batch_that_fits(
            request.model, request.latent.shape, request.latents
        )
        size = min(size, request.latents)
        noise = noise_per_latent(request.latent, request.seed, request.latents)
        longest = max(request.schedules, key=len)
        results: list[tuple[torch.Tensor, ...]] = []

        def inside(prompts: list[Prompt]) -> None:
            x = initial_states(request.model, noise, longest[0])
            groups = [
                Group(prompt.denoiser, share, prompt.extra_args)
                for prompt, share in zip(prompts, x.tensor_split(len(prompts)), strict=True)
            ]
            results.append(self._distil(groups, size))

        batch = request.latent[:1].expand(size, *request.latent.shape[1:]).clone()
        with_prompts(request.model, self._prompts, request.cfg, batch, longest, request.seed, inside)
        return Distilled(self.table(), *results[0])

    def table(self) -> LambdaTable | None:
        """The rows so far, and the best of a refinement that was ended; None where there is no row yet."""
        if self._pipeline is None or not self._pipeline.found:
            return None
        return LambdaTable(self._pipeline.found, model=model_facts(self._request.model))

    def _distil(self, groups: list[Group], size: int) -> tuple[torch.Tensor, ...]:
        """Find the rows; the held-out latents by teacher, D-ODE and stock solver."""
        request, reporter = self._request, self._reporter
        self._pipeline = Pipeline(
            groups,
            [sigmas.to(groups[0].x.device) for sigmas in request.schedules],
            solver=request.solver,
            predictions=PREDICTIONS if request.prediction == AUTO else [request.prediction],
            teacher=request.teacher,
            scale=request.scale,
            flow=is_flow(request.model),
            refine_budget=request.refine_budget,
            micro_batch=size,
            settings=_settings(request, len(groups)),
        )
        shown = self._cost_of_results(groups)
        reporter.later = shown
        reporter.begin(f"{self._pipeline.cost}; then {shown} for the results to look at")
        row = _best_of_first_schedule(self._pipeline.run(reporter))
        reporter.next_run()
        reporter.later = 0
        return self._results(groups, size, row)

    def _cost_of_results(self, groups: list[Group]) -> int:
        """Two runs over the first schedule."""
        request = self._request
        queries = probe_student(resolve(request.solver), request.schedules[0], model=groups[0].model)
        return 2 * len(queries.sigmas) * len(held_out(groups))

    def _results(self, groups: list[Group], size: int, row: LambdaRow) -> tuple[torch.Tensor, ...]:
        """The held-out latents by teacher, row and stock solver, as ComfyUI passes latents on."""
        held = held_out(groups)
        batches = micro_batches(groups, size, held)
        evaluator = Evaluator(self._reporter, total=self._cost_of_results(groups))
        results = [self._pipeline.targets.at(0.0)[held]]
        for each in (row, row.plain):
            denoisers = [evaluator.on(batch, "results to look at") for batch in batches]
            ends = [
                sample_dode(denoiser, batch.x, each.sigmas, batch.extra_args(), disable=True, row=each)
                for denoiser, batch in zip(denoisers, batches, strict=True)
            ]
            results.append(in_order(batches, ends))
        process = self._request.model.model.process_latent_out
        return tuple(process(x.float()) for x in results)


def _best_of_first_schedule(rows: Sequence[LambdaRow]) -> LambdaRow:
    """The greedy row, or its refinement where that is nearer to the teacher on the held-out latents."""
    asked = rows[0].sigmas
    return min((row for row in rows if np.array_equal(row.plain.sigmas, asked)), key=end_error)


def _settings(request: Request, prompts: int) -> dict[str, Any]:
    return {
        "cfg": request.cfg,
        "seed": request.seed,
        "scheduler": request.schedule_name,
        "prompts": prompts,
        "host": "ComfyUI",
    }
