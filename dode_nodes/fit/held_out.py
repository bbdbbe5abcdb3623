"""Measures a row on latents that it was not fitted on, and shrinks λ if it does harm there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..errors import NotFinite
from ..sampling.denoiser import DodeDenoiser
from ..sampling.probe import Queries
from ..sampling.sample import corrected, solver_beside
from ..sampling.solvers import Sampler
from ..tables.gate import finite
from ..tables.provenance import PLAIN, HeldOutErrors
from ..tables.row import LambdaRow
from .evaluator import Evaluator
from .latents import Latents, MicroBatch, in_order, mean_squares
from .progress import Progress
from .runs import Recording, Run
from .teacher import Targets

SHRINKS = (0.75, 0.5, 0.25)
"""What λ is multiplied by, in turn, where the whole of it does harm on the held-out latents."""

Errors = list[float | None]
"""RMS distance to the teacher after each step, the last of them at the end; None for a step that has
no evaluation of its own."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The held-out latents, and how near a student comes to the teacher on them.

    Attributes:
        run: the student's solver and schedule.
        queries: what it asks.
        prediction: what an output is.
        targets: the teacher's states.
        evaluator: what the network is evaluated through.
    """

    run: Run
    queries: Queries
    prediction: str
    targets: Targets
    evaluator: Evaluator

    @property
    def cost(self) -> int:
        """Of one run over all of them, in evaluations of one latent."""
        return len(self.queries.sigmas) * len(self.targets.latents.held_out)

    def errors(self, corrections: np.ndarray, stage: str) -> Errors:
        """Of a run with these corrections."""
        batches = self.targets.latents.batches(self.targets.latents.held_out)
        starts = [k for k in self._starts() if k is not None]
        runs = [
            self.run.trajectory(
                DodeDenoiser(self.evaluator.on(batch, stage), corrections, self.prediction), batch, starts
            )
            for batch in batches
        ]
        return self._errors(batches, [states for states, _ in runs], [end for _, end in runs])

    def recorded_errors(self, corrections: np.ndarray, recordings: Sequence[Recording]) -> Errors:
        """The same for the corrections that these recordings, of all latents, were made with."""
        batches = [recording.batch for recording in recordings]
        starts = [k for k in self._starts() if k is not None]
        states = [{k: recording.states[k] for k in starts} for recording in recordings]
        return self._errors(batches, states, [recording.next_state(corrections) for recording in recordings])

    def _errors(
        self,
        batches: Sequence[MicroBatch],
        states: Sequence[dict[int, Tensor]],
        ends: Sequence[Tensor],
    ) -> Errors:
        """From the states that evaluations ask about, and the results, per micro-batch."""
        held = set(self.targets.latents.held_out)

        def error(of_batches: Sequence[Tensor], sigma: float) -> float:
            squares = [
                mean_squares(state - self.targets.of(batch, sigma))
                for batch, state in zip(batches, of_batches, strict=True)
            ]
            numbers = in_order(batches, [batch.numbers for batch in batches]).tolist()
            counts = [number in held for number in numbers]
            return float(in_order(batches, squares)[counts].mean().sqrt())

        steps = [
            None if k is None else error([each[k] for each in states], self.queries.sigmas[k])
            for k in self._starts()
        ]
        return [*steps, error(ends, 0.0)]

    def _starts(self) -> list[int | None]:
        """The evaluation that begins each step but the first; None where a step has none of its own."""
        counts = self.queries.per_step
        return [k if n else None for k, n in zip(accumulate(counts[:-1]), counts[1:], strict=True)]


@dataclass(frozen=True)
class Verdict:
    """How λ does, or the part of it that is kept.

    Attributes:
        stock: the plain solver's errors.
        dode: the distilled solver's.
        shrunk_to: the part of λ that is kept, 1 for all of it.
        evaluations: what finding out has cost, by stage.
    """

    stock: Errors
    dode: Errors
    shrunk_to: float
    evaluations: dict[str, int]


def no_harm(held_out: HeldOut, corrections: np.ndarray, recordings: Sequence[Recording]) -> Verdict:
    """Compare with the plain solver; where λ does not help at the end, keep the part that helps most, or none.

    Costs at most ``1 + len(SHRINKS)`` runs over the held-out latents.

    Args:
        held_out: what to compare on.
        corrections: the triangle c that was fitted, ``[E, E]``.
        recordings: the fitted student's runs, of all latents.
    """
    evaluator = held_out.evaluator
    begun = evaluator.spent()
    stock = held_out.errors(np.zeros_like(corrections), "stock solver")
    cost = evaluator.spent() - begun
    dode = held_out.recorded_errors(corrections, recordings)
    if _end(dode) < _end(stock) or not corrections.any():  # nothing to shrink
        return Verdict(stock, dode, 1.0, {"stock": cost})

    trials = [(held_out.errors(part * corrections, "shrinking λ"), part) for part in SHRINKS]
    dode, part = min([(stock, 0.0), *trials], key=lambda trial: _end(trial[0]))
    return Verdict(stock, dode, part, {"stock": cost, "shrinking": evaluator.spent() - begun - cost})


def _end(errors: Errors) -> float:
    end = errors[-1]
    return float("inf") if end is None else end


def later_starts_cost(latents: Latents, evaluations: Sequence[int], *, approach: int = 0) -> int:
    """What ``with_later_starts`` takes at most, in evaluations of one latent: for the row, or for its plain solver.

    Args:
        latents: of the fit.
        evaluations: of each of its steps.
        approach: evaluations that it takes to come to the teacher's state at a σ that it did not stop at.
    """
    total = sum(evaluations)
    starts = [k for k, n in zip(accumulate(evaluations[:-1]), evaluations[1:], strict=True) if n]
    return sum(total - k + approach for k in starts) * len(latents.held_out)


def with_later_starts(
    targets: Targets,
    row: LambdaRow,
    solver: Sampler,
    progress: Progress,
    *,
    of_plain: Errors | None = None,
) -> LambdaRow:
    """The row with the held-out errors of runs that begin at its later steps, from the teacher's state there; and
    those of its plain solver.

    img2img, a hires fix and split schedules run the last steps of a row: the best row for them need not be
    the best as a whole, and weights of a run that is not whole may be worse than none. A start from which the
    network's answers are not finite has no error.

    Args:
        of_plain: those of its plain solver, where they are known; they are not measured again.
    """
    if row.errors is None:
        return row
    plain = row.plain
    at_hand = plain.solver == row.solver or not plain.is_callable
    with progress:
        evaluator = Evaluator(progress)
        later = _later_errors(targets, row, solver, evaluator)
        stock: list[float | None] = []
        if of_plain is not None:
            stock = of_plain
        elif row.origin.kind == PLAIN:
            stock = later
        elif at_hand:
            stock = _later_errors(targets, plain, solver_beside(row, solver, plain.solver), evaluator)
    errors: HeldOutErrors = replace(row.errors, dode=(row.errors.dode[0], *later), later_stock=tuple(stock))
    return replace(row, errors=errors, report=_report_with(row, evaluator.spent()))


def _later_errors(
    targets: Targets, row: LambdaRow, solver: Sampler, evaluator: Evaluator
) -> list[float | None]:
    return [
        _error_from(targets, row, step, solver, evaluator) if row.evaluations[step] else None
        for step in range(1, row.steps)
    ]


def _report_with(row: LambdaRow, spent: int) -> dict[str, object]:
    evaluations = dict(row.report.get("evaluations", {}))
    evaluations["later starts"] = evaluations.get("later starts", 0) + spent
    return dict(row.report) | {"evaluations": evaluations}


def _error_from(
    targets: Targets, row: LambdaRow, step: int, solver: Sampler, evaluator: Evaluator
) -> float | None:
    batches = targets.latents.batches(targets.latents.held_out)
    distances = distances_of(row, solver, targets, batches, evaluator, "later starts", step)
    return finite(float(np.sqrt(np.square(distances).mean())))


def distances_of(
    row: LambdaRow,
    solver: Sampler,
    targets: Targets,
    batches: Sequence[MicroBatch],
    evaluator: Evaluator,
    stage: str,
    step: int = 0,
) -> np.ndarray:
    """How far each latent ends from the teacher's end if the row's solver runs it from ``step`` on, ``[n]``, RMS.

    A later run begins with the teacher's state there. Infinite where the network's answers are not finite.
    """
    ends = ends_of(row, solver, targets, batches, evaluator, stage, step)
    return distances_between(ends, targets, batches)


def distances_between(ends: Sequence[Tensor], targets: Targets, batches: Sequence[MicroBatch]) -> np.ndarray:
    """Of each latent's end to the teacher's, ``[n]``, RMS.

    Args:
        ends: per micro-batch, ``[m, C, *spatial]``, on the CPU.
    """
    pairs = zip(batches, ends, strict=True)
    squares = [mean_squares(end - targets.of(batch, 0.0)) for batch, end in pairs]
    return in_order(batches, squares).sqrt().numpy()


def ends_of(
    row: LambdaRow,
    solver: Sampler,
    targets: Targets,
    batches: Sequence[MicroBatch],
    evaluator: Evaluator,
    stage: str,
    step: int = 0,
) -> list[Tensor]:
    """Where the latents end, per micro-batch ``[m, C, *spatial]``, on the CPU; see ``distances_of``."""
    dtype = torch.promote_types(targets.latents.dtype, torch.float32)
    run = Run.of(row, solver, dtype, step)

    def end(batch: MicroBatch) -> Tensor:
        return run(corrected(evaluator.on(batch, stage), row, step), batch)

    starts = (
        list(batches) if step == 0 else _starting(targets, batches, float(row.sigmas[step]), evaluator, stage)
    )
    return [_if_finite(end, batch) for batch in starts]


def _starting(
    targets: Targets, batches: Sequence[MicroBatch], sigma: float, evaluator: Evaluator, stage: str
) -> list[MicroBatch]:
    """The micro-batches at the teacher's states there. All of them before any goes on: a teacher's own model is then
    loaded once for all."""
    near, approach = targets.approach(sigma)
    states = [targets.of(batch, near).to(batch.x.device) for batch in batches]
    if approach is not None:
        taught = [batch.teaching(x) for batch, x in zip(batches, states, strict=True)]
        states = [_if_finite(lambda each: approach(evaluator.on(each, stage), each), each) for each in taught]
    return [replace(batch, x=x.to(batch.x.device)) for batch, x in zip(batches, states, strict=True)]


def _if_finite(run: Callable[[MicroBatch], Tensor], batch: MicroBatch) -> Tensor:
    """Where it comes to, on the CPU; infinite where that is not finite: half precision may not stand it, and that is no
    reason to lose a row."""
    try:
        if batch.x.isfinite().all():
            return run(batch).cpu()
    except NotFinite:
        pass
    return torch.full(batch.x.shape, math.inf, dtype=batch.x.dtype)
