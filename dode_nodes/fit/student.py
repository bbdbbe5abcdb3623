"""A few-step solver as a function of its numbers: its parts, its runs, and what its last state depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sampling.denoiser import Denoiser, DenoiserProxy, DodeDenoiser, history_corrections, history_weights
from ..sampling.solvers import Sampler
from ..sigmas import is_flow
from ..tables.free_outputs import NONE, FreeOutputs
from .latents import MicroBatch
from .runs import Run, Tape

_MOST_ODDS = 100.0  # so that σ stay apart: parts of a schedule are found by them

Outputs = Sequence[Tensor]
"""What the network gave in a run, D at each evaluation, ``[m, C, *spatial]``, on the CPU."""


@dataclass(frozen=True, eq=False)
class Student:
    """A few-step solver and all its numbers. (σ told to the network in place of those asked are none of them:
    with W free, moving the σ themselves reaches the same.)

    Attributes:
        solver: the sampler; options are its keyword arguments.
        prediction: what an output is, ``"noise"`` or ``"data"``.
        sigmas: the schedule, ``[N + 1]``, descending to 0.
        corrections: the triangle c, ``[E, E]``, or one per low pass with columns for free outputs,
            ``[P, E, F + E]``.
        free: outputs that cost no evaluation.
    """

    solver: Sampler
    prediction: str
    sigmas: np.ndarray
    corrections: np.ndarray
    options: Mapping[str, Any] = field(default_factory=dict)
    free: FreeOutputs = NONE

    @property
    def queries(self) -> int:
        """Evaluations that the sampler asks for, E."""
        return int(self.corrections.shape[-2])

    @property
    def evaluations(self) -> int:
        """Of the network, per latent: the first that is asked for may be free."""
        return self.made_before(self.queries)

    def made_before(self, query: int) -> int:
        """How often the network has been evaluated when the sampler asks for evaluation ``query``."""
        return max(query - self.free.first, 0)

    def run(self, model: Denoiser, batch: MicroBatch, played: Outputs = ()) -> tuple[Tensor, Outputs]:
        """Sample; the first outputs are those of ``played``, an earlier run, in place of the network's.

        Returns:
            The last state, ``[m, C, *spatial]``, on the CPU, and all outputs.
        """
        tape = Tape(model, played)
        flow = is_flow(self.sigmas)
        denoiser = DodeDenoiser(tape, self.corrections, self.prediction, free=self.free, flow=flow)
        sigmas = torch.tensor(self.sigmas, dtype=batch.x.dtype)
        end = Run(self.solver, sigmas, dict(self.options))(denoiser, batch)
        return end.cpu(), tape.denoised


class InOwnPrecision(DenoiserProxy):
    """A half-precision denoiser for a sampler in float32: rounding must not drown small differences."""

    def __init__(self, model: Denoiser, dtype: torch.dtype) -> None:
        super().__init__(model)
        self._dtype = dtype

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        denoised: Tensor = self._model(x.to(self._dtype), sigma.to(self._dtype), **extra_args)
        return denoised.to(x.dtype)


# --- The numbers ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weight:
    """How far the corrections of evaluation k are moved along a direction, ``[F + k + 1]``, on one low pass.

    Evaluation k itself stays as it is: the state after it moves, and so do the evaluations from k + 1 on.
    """

    k: int
    direction: np.ndarray
    level: int = 0
    step: float = 0.05  # of a difference, in outputs: well above the noise of a network in half precision

    @property
    def first(self) -> int:
        """The first evaluation that it changes."""
        return self.k + 1

    def move(self, student: Student, amount: float) -> Student:
        """The student with this moved."""
        corrections = student.corrections.copy()
        whole = corrections if corrections.ndim == 2 else corrections[self.level]
        whole[self.k, : len(self.direction)] += amount * self.direction
        return replace(student, corrections=corrections)


@dataclass(frozen=True)
class InnerSigma:
    """Where σ_k lies between its neighbours, as a logit: whatever it is moved by, σ descend.

    The weights are scaled along, so that the states stay as they are until the network answers at the new σ:
    what it is asked about and how far the steps go are fitted apart. (Moving the later σ along, too, took
    more Jacobians to the same end.)
    """

    k: int
    step: float = 0.1  # wide, for hosts round σ to a table of 1000, some 0.6 % apart

    @property
    def first(self) -> int:
        """The first evaluation that it changes."""
        return self.k

    def move(self, student: Student, amount: float) -> Student:
        """The student with this moved."""
        sigmas = student.sigmas.copy()
        above, below = sigmas[self.k - 1], sigmas[self.k + 1]
        odds = (sigmas[self.k] - below) / (above - sigmas[self.k]) * np.exp(amount)
        odds = np.clip(odds, 1 / _MOST_ODDS, _MOST_ODDS)
        sigmas[self.k] = below + (above - below) * odds / (1 + odds)
        scale = np.diff(student.sigmas) / np.diff(sigmas)
        corrections = history_corrections(scale[:, None] * history_weights(student.corrections))
        return replace(student, sigmas=sigmas, corrections=corrections)


Parameter = Weight | InnerSigma


def lambda_parameters(evaluations: int) -> list[Parameter]:
    """Eq. 10's: ô_k = o_k + λ_k (o_k − o_{k−1}). The first evaluation has no predecessor."""
    unit = np.eye(evaluations)
    return [Weight(k, (unit[k] - unit[k - 1])[: k + 1]) for k in range(1, evaluations)]


REACH = 4
"""Outputs that an evaluation's weights are fitted on, its own the newest: all of ten gained nothing over four."""


def history_parameters(
    evaluations: int, reach: int = REACH, *, level: int = 0, columns: int = 0
) -> list[Parameter]:
    """Eq. 8's: the weights of the ``reach`` newest outputs, row by row of the triangle.

    Args:
        level: of the low pass whose weights they are.
        columns: F, of free outputs, which come first.
    """
    unit = np.eye(columns + evaluations)
    return [
        Weight(k, unit[columns + j, : columns + k + 1], level)
        for k in range(evaluations)
        for j in range(max(0, k - reach + 1), k + 1)
    ]


def free_parameters(evaluations: int, column: int, *, first: int = 0) -> list[Parameter]:
    """A free output's weights, evaluation by evaluation from ``first`` on; ``column`` is where it stands."""
    return [Weight(k, np.eye(column + 1)[column]) for k in range(first, evaluations)]


def sigma_parameters(steps: int) -> list[Parameter]:
    """Every σ between the first and the last."""
    return [InnerSigma(k) for k in range(1, steps)]


def first_changed(parameters: Sequence[Parameter]) -> int:
    """The first evaluation that any of them changes."""
    return min((parameter.first for parameter in parameters), default=0)


def jacobian_cost(parameters: Sequence[Parameter], student: Student) -> int:
    """Evaluations per latent of one Jacobian: a parameter's run starts where it changes something."""
    return sum(student.evaluations - student.made_before(parameter.first) for parameter in parameters)


def moved(student: Student, parameters: Sequence[Parameter], amounts: Sequence[float]) -> Student:
    """The student with each parameter moved by its amount."""
    for parameter, amount in zip(parameters, amounts, strict=True):
        student = parameter.move(student, float(amount))
    return student
