"""What the node 'Distill λ' does: the pipeline from latents to rows, inside ComfyUI's sampling path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import comfy.samplers
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...fit.consistency import check_consistency, consistency_cost
from ...fit.evaluator import Evaluator
from ...fit.latents import Latents, in_order
from ...fit.pipeline import Pipeline, Recipe
from ...fit.progress import Progress
from ...fit.runs import Run
from ...sampling.denoiser import DodeDenoiser, row_corrections
from ...sampling.solvers import resolve
from ...sigmas import check_schedules
from ...tables.row import LambdaRow
from ...tables.table import LambdaTable
from .model_facts import is_flow, model_facts, wrapper_names
from .prompts import (
    Conditioning,
    GuidedModel,
    cfg_guider,
    initial_states,
    micro_batch_that_fits,
    noise_per_latent,
    one_prompt_per_row,
)


class Reporter(Protocol):
    """Where progress is shown, and cancelled."""

    def begin(self, *lines: str) -> None:
        """Say what is to come."""

    def __call__(self, progress: Progress) -> None:
        """After an evaluation."""


@dataclass(frozen=True)
class Request:
    """What to distil.

    Attributes:
        conditionings: the positives, each taking an equal share of the latents.
        latent: an empty latent of the size to distil at, ``[1, C, *spatial]``.
        latents: how many noises to draw from ``seed``.
        schedules: the students' sigmas.
        recipe: what to fit, and how.
        micro_batch: latents evaluated at a time; 0 for what fits.
    """

    model: ModelPatcher
    conditionings: Sequence[Conditioning]
    negative: Conditioning
    cfg: float
    latent: torch.Tensor
    latents: int
    seed: int
    schedules: Sequence[torch.Tensor]
    recipe: Recipe
    micro_batch: int = 0


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
        DodeError: there are fewer latents than prompts, or a schedule is none.
    """

    def __init__(self, request: Request, reporter: Reporter) -> None:
        check_schedules(request.schedules)
        self._request = request
        self._facts = model_facts(request.model)
        self._reporter = reporter
        self._guiders = [
            guider
            for positive in request.conditionings
            for guider in one_prompt_per_row(
                cfg_guider(request.model, positive, request.negative, request.cfg)
            )
        ]
        fewest = max(2, len(self._guiders))
        if request.latents < fewest:
            raise DodeError(
                f"{len(self._guiders)} prompts need at least {fewest} latents, got {request.latents}: "
                "some are kept to check λ on"
            )
        self._pipeline: Pipeline | None = None

    def run(self) -> Distilled:
        """All of it, inside ComfyUI's sampling path."""
        request = self._request
        size = request.micro_batch or micro_batch_that_fits(
            request.model, request.latent.shape, request.latents
        )
        noise = noise_per_latent(request.latent, request.seed, request.latents)
        x = initial_states(request.model, noise, request.schedules[0][0])
        prompts = len(self._guiders)
        shares = zip(self._guiders, noise.tensor_split(prompts), x.tensor_split(prompts), strict=True)
        groups = [GuidedModel(guider, own, request.seed).group(begun) for guider, own, begun in shares]
        return self._distil(Latents(groups, min(size, request.latents)))

    def table(self) -> LambdaTable | None:
        """The rows so far, and the best of a refinement that was ended; None where there is no row yet."""
        if self._pipeline is None or not self._pipeline.found:
            return None
        return LambdaTable(self._pipeline.found, model=self._facts)

    def _distil(self, latents: Latents) -> Distilled:
        """Find the rows; then the held-out latents by teacher, D-ODE and stock solver."""
        pipeline = self._pipeline = Pipeline(
            latents,
            [sigmas.to(latents.groups[0].x.device) for sigmas in self._request.schedules],
            self._recipe(len(latents.groups)),
        )
        shown = 2 * len(latents.held_out) * pipeline.evaluations(0)
        trials = consistency_cost(latents)
        self._reporter.begin(
            f"{pipeline.cost}; plus {trials} to check the model first and {shown} for the results to look at",
            *pipeline.remarks,
        )
        with Progress(trials + pipeline.cost.total + shown, self._reporter) as work:
            trying, fitting, showing = work.split(trials, pipeline.cost.total, shown)
            self._check_model(latents, trying)
            row = _best_of_first_schedule(pipeline.run(fitting))
            with showing:
                dode, stock = (self._held_out_by(each, latents, showing) for each in (row, row.plain))
        assert pipeline.targets is not None  # noqa: S101  # the pipeline has run
        ends = torch.cat(list(pipeline.targets.ends))[latents.held_out]
        table = self.table()
        assert table is not None  # noqa: S101
        return Distilled(table, *(self._as_latent(x) for x in (ends, dode, stock)))

    def _check_model(self, latents: Latents, progress: Progress) -> None:
        """Before the teacher: that one state has one answer."""
        model, schedule = self._request.model, self._request.schedules[0]
        middle = float(schedule[len(schedule) // 2]) or float(schedule[0])
        dtype = model.model_dtype() or torch.float32
        check_consistency(latents, middle, dtype, progress, suspects=", ".join(wrapper_names(model)))

    def _recipe(self, prompts: int) -> Recipe:
        """With what is known of the model, and what is kept of the request."""
        recipe = self._request.recipe
        facts = {
            "cfg": self._request.cfg,
            "seed": self._request.seed,
            "prompts": prompts,
            "host": "ComfyUI",
        }
        return replace(
            recipe,
            teacher=replace(recipe.teacher, flow=is_flow(self._request.model)),
            settings=dict(recipe.settings) | facts,
        )

    def _held_out_by(self, row: LambdaRow, latents: Latents, progress: Progress) -> torch.Tensor:
        """The results of a row on the held-out latents."""
        batches = latents.batches(latents.held_out)
        evaluator = Evaluator(progress)
        run = Run(
            resolve(row.solver), torch.tensor(row.sigmas, dtype=torch.float32), dict(row.solver_options)
        )
        ends = [
            run(
                DodeDenoiser(evaluator.on(batch, "results to look at"), row_corrections(row), row.prediction),
                batch,
            )
            for batch in batches
        ]
        return in_order(batches, ends)

    def _as_latent(self, x: torch.Tensor) -> torch.Tensor:
        """As ComfyUI passes latents on."""
        latent: torch.Tensor = self._request.model.model.process_latent_out(x.float())
        return latent


def _best_of_first_schedule(rows: Sequence[LambdaRow]) -> LambdaRow:
    """The greedy row, or its refinement where that is nearer to the teacher on the held-out latents."""
    asked = rows[0].sigmas
    return min((row for row in rows if np.array_equal(row.plain.sigmas, asked)), key=LambdaRow.error_from)
