"""Levenberg–Marquardt on a student's last state, with no derivative of the network.

With x_b(θ) the student's last state from latent b, for numbers θ, and x*_b the teacher's, minimise

    F(θ) = Σ_b ‖r_b‖²,    r_b = (x_b(θ) − x*_b)/√d.

The Jacobian is had by forward differences, in the memory that sampling takes, and is carried on from step to
step by Broyden's update, which costs no evaluation. Latents come in micro-batches and may be spread over the
ranks of a process group: what decides are sums over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .errors import DodeError
from .groups import Evaluator, MicroBatch
from .ranks import sum_over_ranks
from .student import Answers, InOwnPrecision, Parameter, Student, first_changed, moved

RUNS = 3
"""Of the student per Jacobian, each a trial step; six gained no more."""

_DAMPING = 1e-2
_DAMPING_FACTOR = 5.0
_LEAST_DAMPING = 1e-7
_LONGEST_STEP = 5.0  # of any number
_SLIGHT_STEP = 0.003  # of the error, by a step that is not worth another one
_SLIGHT_GAIN = 0.01  # of the error, by a Jacobian that is not worth another one
_SKETCH = 4096


@dataclass(frozen=True, eq=False)
class Played:
    """A student's run over some latents.

    Attributes:
        student: who ran.
        answers: the network's, per micro-batch of this rank.
        residuals: r_b, per micro-batch ``[m, d]``, float64 on the CPU.
        squared_error: F, over the latents of all ranks; infinite where the network could not be evaluated.
        latents: how many those are.
    """

    student: Student
    answers: list[Answers]
    residuals: list[Tensor]
    squared_error: float
    latents: int

    @property
    def error(self) -> float:
        """RMS distance to the teacher's end; NaN without latents."""
        return math.sqrt(self.squared_error / self.latents) if self.latents else math.nan


class Latents:
    """Latents to run students on, and the ends they should come to.

    Args:
        batches: this rank's latents.
        ends: the teacher's last states of all latents, ``[B, C, *spatial]``.
        evaluator: what the network is evaluated through.
        stage: what for.
    """

    def __init__(self, batches: Sequence[MicroBatch], ends: Tensor, evaluator: Evaluator, stage: str) -> None:
        self._batches = batches
        self._ends = ends
        self._evaluator = evaluator
        self._stage = stage

    def run(self, student: Student, like: Played | None = None, until: int = 0) -> Played:
        """All latents, from the noise to the end; every rank must call it.

        Args:
            student: who runs.
            like: a run whose first ``until`` evaluations are this student's, too: they are not made again.
        """
        known = [()] * len(self._batches) if like is None else [answers[:until] for answers in like.answers]
        runs = [self._run(*both, student) for both in zip(self._batches, known, strict=True)]
        residuals = [residuals for residuals, _ in runs]
        return _played(student, [answers for _, answers in runs], residuals)

    def trial(self, student: Student, like: Played, until: int) -> Played:
        """A run; with an infinite error where the network does not stand it, as half precision may not."""
        try:
            return self.run(student, like, until)
        except DodeError:
            return _played(student, [], [torch.full((1, 1), math.inf)])

    def jacobian(self, played: Played, parameters: Sequence[Parameter]) -> Jacobian:
        """By forward differences; evaluations that a parameter leaves as they were are not made again."""
        parts = []
        for batch, answers, residuals in zip(self._batches, played.answers, played.residuals, strict=True):
            columns = []
            for parameter in parameters:
                student = parameter.move(played.student, parameter.step)
                there, _ = self._run(batch, answers[: parameter.first], student)
                columns.append(_sketch((there - residuals) / parameter.step).float())
            parts.append(torch.stack(columns, dim=1))
        return Jacobian(parts, len(parameters))

    def _run(self, batch: MicroBatch, known: Answers, student: Student) -> tuple[Tensor, Answers]:
        """Residuals, ``[m, d]``, and answers."""
        model = self._evaluator.on(batch, self._stage)
        dtype = batch.x.dtype
        wide = torch.promote_types(dtype, torch.float32)
        if wide != dtype:
            model, batch = InOwnPrecision(model, dtype), replace(batch, x=batch.x.to(wide))
        end, answers = student.run(model, batch, known)
        residuals = (end.double() - self._ends[batch.numbers].double()).flatten(1)
        return residuals / math.sqrt(residuals.shape[1]), answers


def _played(student: Student, answers: list[Answers], residuals: list[Tensor]) -> Played:
    mine = [sum(float(part.square().sum()) for part in residuals), sum(map(len, residuals))]
    squared_error, latents = sum_over_ranks(np.array(mine, dtype=np.float64))
    return Played(student, answers, residuals, float(squared_error), int(latents))


class Jacobian:
    """J_b = ∂r_b/∂θ of all latents: per micro-batch of this rank ``[m, P, q]``, float32 on the CPU.

    Of a latent with more than ``_SKETCH`` numbers only a sketch is kept, so that q is bounded.
    """

    def __init__(self, parts: Sequence[Tensor], parameters: int) -> None:
        self._parts = parts
        self._parameters = parameters

    def normal_equations(self, residuals: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Σ_b J_bᵀJ_b, ``[P, P]``, and Σ_b J_bᵀr_b, ``[P]``, over the latents of all ranks."""
        gram = torch.zeros(self._parameters, self._parameters, dtype=torch.float64)
        right = torch.zeros(self._parameters, dtype=torch.float64)
        for part, rs in zip(self._parts, residuals, strict=True):
            for jacobian, r in zip(part.double(), _sketch(rs), strict=True):
                gram += jacobian @ jacobian.T
                right += jacobian @ r
        return sum_over_ranks(gram.numpy()), sum_over_ranks(right.numpy())

    def learn(self, before: Played, after: Played, step: np.ndarray, metric: np.ndarray) -> None:
        """Broyden's update: the least change, in the metric, by which J explains what the step has done."""
        length = metric @ step**2
        if length < np.finfo(np.float64).tiny:  # too short a step to learn from
            return
        along = torch.from_numpy(metric * step / length)
        for part, old, new in zip(self._parts, before.residuals, after.residuals, strict=True):
            expected = torch.einsum("mpq,p->mq", part.double(), torch.from_numpy(step))
            unexplained = _sketch(new - old) - expected
            part += torch.einsum("mq,p->mpq", unexplained, along).float()


def _sketch(vectors: Tensor) -> Tensor:
    """``[m, d]`` as ``[m, q]``, q ≤ ``_SKETCH``: random sums with random signs, which keep inner products.

    Least squares in many more of them than there are parameters is least squares in all of d, nearly.
    """
    d = vectors.shape[1]
    if d <= _SKETCH:
        return vectors
    place, sign = _places(d)
    return vectors.new_zeros(len(vectors), _SKETCH).index_add_(1, place, vectors * sign)


@lru_cache(maxsize=1)
def _places(d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    place = torch.randint(_SKETCH, (d,), generator=generator)
    sign = torch.randint(2, (d,), generator=generator) * 2.0 - 1
    return place, sign.double()


def descend(latents: Latents, start: Played, parameters: Sequence[Parameter]) -> Iterator[Played]:
    """Lower F, Jacobian by Jacobian, until one gains little; yields after each.

    Each costs its forward differences and at most ``RUNS`` runs.
    """
    played, damping = start, _DAMPING
    while True:
        before = played.error
        played, damping = _steps(latents, played, parameters, damping)
        yield played
        if played.error >= before * (1 - _SLIGHT_GAIN):
            return


def _steps(
    latents: Latents, played: Played, parameters: Sequence[Parameter], damping: float
) -> tuple[Played, float]:
    """The steps that one Jacobian is good for: the best run, and the damping that has served."""
    jacobian = latents.jacobian(played, parameters)
    unchanged = first_changed(parameters)
    for _ in range(RUNS):
        gram, right = jacobian.normal_equations(played.residuals)
        metric = np.maximum(np.diag(gram), 1e-9 * np.diag(gram).max())
        if not metric.any() or not right.any():  # nothing moves the end, or nothing is left to gain
            break
        step, damping = _damped_step(gram, right, metric, damping)
        trial = latents.trial(moved(played.student, parameters, step), played, unchanged)
        now, then = played.squared_error, trial.squared_error
        if math.isfinite(then):
            jacobian.learn(played, trial, step, metric)
        if not then < now:
            damping *= _DAMPING_FACTOR
            continue
        predicted = now + 2 * right @ step + step @ gram @ step
        if now - then > (now - predicted) / 2:
            damping = max(damping / _DAMPING_FACTOR, _LEAST_DAMPING)
        gain, played = 1 - trial.error / played.error, trial
        if gain < _SLIGHT_STEP:
            break
    return played, damping


def _damped_step(
    gram: np.ndarray, right: np.ndarray, metric: np.ndarray, damping: float
) -> tuple[np.ndarray, float]:
    """−(JᵀJ + μ diag)⁻¹ Jᵀr, with the least μ from ``damping`` on that keeps it within bounds."""
    while True:
        step = -np.linalg.solve(gram + damping * np.diag(metric), right)
        if np.abs(step).max() <= _LONGEST_STEP:
            return step, damping
        damping *= _DAMPING_FACTOR
