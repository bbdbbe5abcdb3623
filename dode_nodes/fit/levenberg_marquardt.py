"""Levenberg–Marquardt on a student's last state, with no derivative of the network.

Let x_b(θ) be the student's last state from latent b, for numbers θ, and x*_b the teacher's. Minimise

    F(θ) = Σ_b ρ(‖r_b‖),    r_b = (x_b(θ) − x*_b)/√d.

ρ is Huber's: the square, and beyond δ a straight line, so that a few latents that end as another picture cannot
bend the fit. It is minimised by reweighting: each latent counts min(1, δ/‖r_b‖) in the normal equations.

The Jacobian is computed by forward differences and needs no more memory than sampling. Broyden's update keeps it
up to date from step to step, and costs no evaluation. Latents come in micro-batches and may be spread over the
ranks of a process group: every decision is made on sums over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..errors import NotFinite
from .done_jacobians import Done, DoneJacobians
from .evaluator import Evaluator
from .latents import MicroBatch, in_order
from .ranks import sum_over_ranks
from .student import InOwnPrecision, Outputs, Parameter, Student, first_changed, moved
from .teacher import Targets

RUNS = 3
"""Of the student per Jacobian, each a trial step. Six were no better."""

_DAMPING = 1e-2
_DAMPING_FACTOR = 5.0
_LEAST_DAMPING = 1e-7
_MOST_DAMPING = 1e30
_LONGEST_STEP = 5.0  # of any number
_SLIGHT_STEP = 0.003  # of the error, by a step that is not worth another one
_SLIGHT_GAIN = 0.01  # of the error, by a Jacobian that is not worth another one
_OUTLYING = 2.0  # times the median distance
_SKETCH = 4096


@dataclass(frozen=True, eq=False)
class Played:
    """A student's run over some latents.

    Attributes:
        student: who ran.
        outputs: the network's, per micro-batch of this rank.
        residuals: r_b, per micro-batch ``[m, d]``, float64 on the CPU.
        distances: ‖r_b‖ of the latents of all ranks, in their order; infinite where the run did not end in finite
            numbers.
    """

    student: Student
    outputs: list[Outputs]
    residuals: list[Tensor]
    distances: np.ndarray

    @property
    def error(self) -> float:
        """RMS distance to the teacher's end; NaN without latents."""
        return float(np.sqrt(np.square(self.distances).mean())) if len(self.distances) else math.nan

    @property
    def outlying(self) -> float:
        """Huber's δ: what is farther than this is not taken at its square."""
        return _OUTLYING * float(np.median(self.distances)) or math.inf

    def objective(self, outlying: float) -> float:
        """F, for a δ."""
        near = np.minimum(self.distances, outlying)
        return float((near * (2 * self.distances - near)).sum())


def geometric_mean(distances: np.ndarray) -> float:
    """Of distances, of which a few that are large do not decide; infinite where one is, NaN of none."""
    if not len(distances):
        return math.nan
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(distances).mean()))


class LeastSquaresProblem:
    """Latents to run students on, and the ends they should come to.

    Args:
        targets: the teacher's states.
        only: the latents' numbers.
        evaluator: what the network is evaluated through.
        stage: what for.

    Attributes:
        numbers: theirs, on all ranks.
    """

    def __init__(self, targets: Targets, only: Sequence[int], evaluator: Evaluator, stage: str) -> None:
        self._targets = targets
        self._batches = targets.latents.batches(only)
        self.numbers = list(only)
        self._evaluator = evaluator
        self._stage = stage

    def run(self, student: Student, like: Played | None = None, until: int = 0) -> Played:
        """All latents, from the noise to the end; every rank must call it.

        Args:
            student: who runs.
            like: a run whose first ``until`` evaluations are this student's, too: they are not made again.
        """
        known: list[Outputs] = [()] * len(self._batches)
        if like is not None:
            known = [outputs[: student.made_before(until)] for outputs in like.outputs]
        runs = [self._run(*both, student) for both in zip(self._batches, known, strict=True)]
        residuals = [residuals for residuals, _ in runs]
        distances = in_order(self._batches, [part.square().sum(1).sqrt() for part in residuals]).numpy()
        finite = np.where(np.isfinite(distances), distances, math.inf)
        return Played(student, [outputs for _, outputs in runs], residuals, finite)

    def trial(self, student: Student, like: Played | None = None, until: int = 0) -> Played:
        """A run; its error is infinite where the network's answer is not finite, as in half precision it may be."""
        try:
            return self.run(student, like, until)
        except NotFinite:
            return Played(student, [], [], np.full(len(self.numbers), math.inf))

    def spent(self) -> int:
        """Evaluations of one latent each so far, of all ranks and of all that share the evaluator."""
        return self._evaluator.spent()

    def credit(self, evaluations: int) -> None:
        """Count evaluations of an earlier run, whose results are known."""
        self._evaluator.credit(evaluations)

    def jacobian(self, played: Played, parameters: Sequence[Parameter]) -> Jacobian:
        """By forward differences; evaluations that a parameter leaves as they were are not made again."""
        parts = []
        for batch, outputs, residuals in zip(self._batches, played.outputs, played.residuals, strict=True):
            columns = []
            for parameter in parameters:
                student = parameter.move(played.student, parameter.step)
                there, _ = self._run(batch, outputs[: student.made_before(parameter.first)], student)
                columns.append(count_sketch((there - residuals) / parameter.step).float())
            parts.append(torch.stack(columns, dim=1))
        return Jacobian(parts, len(parameters))

    def _run(self, batch: MicroBatch, known: Outputs, student: Student) -> tuple[Tensor, Outputs]:
        """Residuals, ``[m, d]``, and outputs."""
        model = self._evaluator.on(batch, self._stage)
        dtype = batch.x.dtype
        wide = torch.promote_types(dtype, torch.float32)
        if wide != dtype:
            model, batch = InOwnPrecision(model, dtype), replace(batch, x=batch.x.to(wide))
        end, outputs = student.run(model, batch, known)
        residuals = (end.double() - self._targets.of(batch, 0.0).double()).flatten(1)
        return residuals / math.sqrt(residuals.shape[1]), outputs


class Jacobian:
    """J_b = ∂r_b/∂θ of all latents: per micro-batch of this rank ``[m, P, q]``, float32 on the CPU.

    Of a latent with more than ``_SKETCH`` numbers only a sketch is kept, so that q is bounded.
    """

    def __init__(self, parts: Sequence[Tensor], parameters: int) -> None:
        self._parts = parts
        self._parameters = parameters

    def normal_equations(
        self, residuals: Sequence[Tensor], outlying: float = math.inf
    ) -> tuple[np.ndarray, np.ndarray]:
        """Σ_b w_b J_bᵀJ_b, ``[P, P]``, and Σ_b w_b J_bᵀr_b, ``[P]``, over the latents of all ranks."""
        gram = torch.zeros(self._parameters, self._parameters, dtype=torch.float64)
        right = torch.zeros(self._parameters, dtype=torch.float64)
        for part, rs in zip(self._parts, residuals, strict=True):
            weights = (outlying / rs.square().sum(1).sqrt()).clamp(max=1)
            for w, jacobian, r in zip(weights, part.double(), count_sketch(rs), strict=True):
                gram += w * (jacobian @ jacobian.T)
                right += w * (jacobian @ r)
        return sum_over_ranks(gram.numpy()), sum_over_ranks(right.numpy())

    def broyden_update(self, before: Played, after: Played, step: np.ndarray, metric: np.ndarray) -> None:
        """The least change, in the metric, by which J explains what the step has done (Broyden 1965)."""
        length = metric @ step**2
        if length < np.finfo(np.float64).tiny:  # too short a step to learn from
            return
        along = torch.from_numpy(metric * step / length)
        for part, old, new in zip(self._parts, before.residuals, after.residuals, strict=True):
            expected = torch.einsum("mpq,p->mq", part.double(), torch.from_numpy(step))
            unexplained = count_sketch(new - old) - expected
            part += torch.einsum("mq,p->mpq", unexplained, along).float()


def count_sketch(vectors: Tensor) -> Tensor:
    """``[m, d]`` as ``[m, q]``, q ≤ ``_SKETCH``: random sums with random signs, which keep inner products.

    Least squares in many more of them than there are parameters is least squares in all of d, nearly
    (Clarkson & Woodruff 2013, arXiv:1207.6365).
    """
    d = vectors.shape[1]
    if d <= _SKETCH:
        return vectors
    place, sign = _places(d)
    return vectors.new_zeros(len(vectors), _SKETCH).index_add_(1, place, vectors * sign)


@lru_cache(maxsize=4)
def _places(d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    place = torch.randint(_SKETCH, (d,), generator=generator)
    sign = torch.randint(2, (d,), generator=generator) * 2.0 - 1
    return place, sign.double()


def levenberg_marquardt(
    problem: LeastSquaresProblem,
    start: Played,
    parameters: Sequence[Parameter],
    jacobians: int,
    done: DoneJacobians | None = None,
) -> Iterator[Played]:
    """Lower F, Jacobian by Jacobian, until one gains little; yields after each.

    Each costs its forward differences and at most ``RUNS`` runs.

    Args:
        problem: what F is a sum over.
        start: a run whose error is finite.
        parameters: what is fitted.
        jacobians: at most so many.
        done: what is known of them, and where they are noted; None for nowhere.
    """
    done = done or DoneJacobians()
    played, damping = start, _DAMPING
    for _ in range(jacobians):
        before, outlying = played.objective(played.outlying), played.outlying
        played, damping = _known_steps(problem, played, parameters, damping, done)
        yield played
        if not played.objective(outlying) < before * (1 - _SLIGHT_GAIN) ** 2:
            return


def _known_steps(
    problem: LeastSquaresProblem,
    played: Played,
    parameters: Sequence[Parameter],
    damping: float,
    done: DoneJacobians,
) -> tuple[Played, float]:
    """``_steps``; of a Jacobian that is known, one run where it has led."""
    begun = problem.spent()
    if (known := done.next(played.student, damping)) is not None:
        again = problem.trial(known.student, played, first_changed(parameters))
        problem.credit(known.evaluations - (problem.spent() - begun))
        return again, known.damping
    after, served = _steps(problem, played, parameters, damping)
    done.add(played.student, damping, Done(after.student, served, problem.spent() - begun))
    return after, served


def _steps(
    problem: LeastSquaresProblem, played: Played, parameters: Sequence[Parameter], damping: float
) -> tuple[Played, float]:
    """The steps that one Jacobian is good for: the best run, and the damping that has served."""
    jacobian = problem.jacobian(played, parameters)
    unchanged, outlying = first_changed(parameters), played.outlying
    for _ in range(RUNS):
        gram, right = jacobian.normal_equations(played.residuals, outlying)
        metric = np.maximum(np.diag(gram), 1e-9 * np.diag(gram).max(initial=0))
        if not metric.any() or not right.any():  # nothing moves the end, or nothing is left to gain
            break
        damped = _damped_step(gram, right, metric, damping)
        if damped is None:
            break
        step, damping = damped
        trial = problem.trial(moved(played.student, parameters, step.tolist()), played, unchanged)
        now, then = played.objective(outlying), trial.objective(outlying)
        if math.isfinite(then):
            jacobian.broyden_update(played, trial, step, metric)
        if not then < now:
            damping = min(damping * _DAMPING_FACTOR, _MOST_DAMPING)
            continue
        predicted = now + 2 * right @ step + step @ gram @ step
        if now - then > (now - predicted) / 2:
            damping = max(damping / _DAMPING_FACTOR, _LEAST_DAMPING)
        gain, played = 1 - math.sqrt(then / now), trial
        if gain < _SLIGHT_STEP:
            break
    return played, damping


def _damped_step(
    gram: np.ndarray, right: np.ndarray, metric: np.ndarray, damping: float
) -> tuple[np.ndarray, float] | None:
    """−(JᵀJ + μ diag)⁻¹ Jᵀr, with the least μ from ``damping`` on that keeps it within bounds.

    None where there is no such step: the Jacobian is not finite, as where a start is near overflow.
    """
    if not (np.isfinite(gram).all() and np.isfinite(right).all()):
        return None
    while damping <= _MOST_DAMPING:
        step = -np.linalg.solve(gram + damping * np.diag(metric), right)
        if np.abs(step).max() <= _LONGEST_STEP:
            return step, damping
        damping *= _DAMPING_FACTOR
    return None
