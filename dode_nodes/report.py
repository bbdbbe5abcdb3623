"""What λ does on latents that it was not fitted on: errors against the teacher, and no harm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor

from .denoiser import DodeDenoiser
from .groups import Evaluator, MicroBatch, in_order, root_mean_square
from .probe import Queries
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
        numbers: the held-out latents', ascending.
        batches: those latents.
        evaluator: what the network is evaluated through.
    """

    run: Run
    queries: Queries
    prediction: str
    targets: Targets
    numbers: Sequence[int]
    batches: Sequence[MicroBatch]
    evaluator: Evaluator

    def errors(self, corrections: np.ndarray, stage: str) -> Errors:
        """Of a run with these corrections."""
        starts = [k for k in self._starts() if k is not None]
        runs = [
            self.run.trajectory(
                DodeDenoiser(self.evaluator.on(batch, stage), corrections, self.prediction), batch, starts
            )
            for batch in self.batches
        ]
        states = {k: in_order(self.batches, [states[k] for states, _ in runs]) for k in starts}
        return self._errors(states, in_order(self.batches, [end for _, end in runs]))

    def recorded_errors(self, corrections: np.ndarray, recordings: Sequence[Recording]) -> Errors:
        """The same for the corrections that these recordings, of all latents, were made with."""
        batches = [recording.batch for recording in recordings]
        starts = [k for k in self._starts() if k is not None]
        states = {k: in_order(batches, [r.states[k] for r in recordings])[self.numbers] for k in starts}
        ends = in_order(batches, [recording.next_state(corrections) for recording in recordings])
        return self._errors(states, ends[self.numbers])

    def _errors(self, states: dict[int, Tensor], end: Tensor) -> Errors:
        """From the states that evaluations ask about, and the results."""

        def error(state: Tensor, sigma: float) -> float:
            return root_mean_square(state - self.targets.at(sigma)[self.numbers])

        steps = [None if k is None else error(states[k], self.queries.sigmas[k]) for k in self._starts()]
        return [*steps, error(end, 0.0)]

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

    def to_json(self) -> dict[str, Any]:
        """For a row's report."""
        ends = {"stock_end": self.stock[-1], "dode_end": self.dode[-1]}
        return {"error": {"stock": self.stock, "dode": self.dode} | ends, "shrunk_to": self.shrunk_to}


def no_harm(held_out: HeldOut, corrections: np.ndarray, recordings: Sequence[Recording]) -> Verdict:
    """Compare with the plain solver; where λ does not help at the end, keep the part that helps most, or none.

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
    if dode[-1] < stock[-1]:
        return Verdict(stock, dode, 1.0, {"stock": cost})

    evaluator.total += len(SHRINKS) * cost
    trials = [(held_out.errors(part * corrections, "shrinking λ"), part) for part in SHRINKS]
    dode, part = min([(stock, 0.0), *trials], key=lambda trial: trial[0][-1])
    return Verdict(stock, dode, part, {"stock": cost, "shrinking": evaluator.spent() - begun - cost})


def finite(value: float) -> float | None:
    """A number as a report may hold it: JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
