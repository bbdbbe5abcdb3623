"""A row's run as one evaluation after the other, for hosts that ask the network themselves.

``sample_dode`` in the other direction: the same weights (``corrected``) and the same solver, whose way from one
evaluation to the next has been read off it (``multistep.trace``). A host may change the state in between, as
inpainting does: what follows goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from ..errors import DodeError
from ..tables.row import LambdaRow
from .denoiser import Denoiser
from .multistep import Trace, trace
from .sample import corrected, solver_of


@dataclass(frozen=True, eq=False)
class Course:
    """The evaluations of a run.

    Attributes:
        trace: the solver's, over the σ that are run.
        row: whose weights correct it; None for the plain solver.
        step: of the row's schedule that the run begins with.
    """

    trace: Trace
    row: LambdaRow | None = None
    step: int = 0

    @classmethod
    def of(cls, row: LambdaRow, step: int = 0) -> Course:
        """Of a row, from one of its steps on.

        Raises:
            DodeError: its solver is not here, cannot begin there, or cannot be run one evaluation at a time.
        """
        if not row.evaluations[step]:
            raise DodeError(f"{row.solver} cannot start at step {step} of {row.label}")
        count = sum(row.evaluations[step:])
        solver = solver_of(row, None)
        return cls(trace(solver, row.sigmas[step:], count, row.solver_options), row, step)

    @classmethod
    def euler(cls, sigmas: np.ndarray) -> Course:
        """Of Euler over any σ, ``[N + 1]``."""
        return cls(Trace(tuple(sigmas[:-1].tolist()), np.diag(np.diff(sigmas))))

    @property
    def free_first(self) -> bool:
        """Whether the first of the evaluations costs none of the network."""
        return self.row is not None and self.row.free.first and self.step == 0

    @property
    def asked(self) -> tuple[float, ...]:
        """The σ of each evaluation of the network."""
        return self.trace.sigmas[int(self.free_first) :]

    def asked_about(self, x: Tensor) -> Tensor:
        """The state that the network is asked about first, for a run that begins with ``x``, ``[B, C, *spatial]``."""
        return StepwiseRun(self).freely(x)


class StepwiseRun:
    """One run: ``after`` is called once for each evaluation of the network, in order."""

    def __init__(self, course: Course) -> None:
        self._sigmas, self._increments = course.trace.sigmas, course.trace.increments
        self._free_first = course.free_first
        self._denoiser: Denoiser = self._network
        if course.row is not None:
            self._denoiser = corrected(self._network, course.row, course.step)
        self._given = torch.empty(0)  # what the network has denoised
        self._noises: dict[int, Tensor] = {}  # ô_j, of the evaluations that a later state needs
        self._next = 0

    def _network(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self._given

    def freely(self, x: Tensor) -> Tensor:
        """Pass the first evaluation if it costs nothing: the state after it; else ``x``."""
        if self._next or not self._free_first:
            return x
        return self._state_after(x, self._asked(x))

    def after(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The state that is asked about next, or the result; and the denoised that led to it.

        Args:
            x: the state that the host has, ``[B, C, *spatial]``: for the first evaluation, the one that it began with.
            noise: the network's output for it, as (x − D)/σ: the noise, or a flow model's velocity.

        Raises:
            DodeError: there are no more evaluations.
        """
        x = self.freely(x)
        if self._next == len(self._sigmas):
            raise DodeError(
                f"the run has ended after {self._next} evaluations; set the steps anew for another one"
            )
        self._given = x - self._sigmas[self._next] * noise
        denoised = self._asked(x)
        own = noise if denoised is self._given else None  # what is not corrected stays as it is, to the bit
        return self._state_after(x, denoised, own), denoised

    def _asked(self, x: Tensor) -> Tensor:
        """What the weights make of the network's answer, or of none."""
        return self._denoiser(x, x.new_full((len(x),), self._sigmas[self._next]))

    def _state_after(self, x: Tensor, denoised: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_k + Σ_j S_kj ô_j."""
        k = self._next
        self._next += 1
        self._noises[k] = (x - denoised) / self._sigmas[k] if noise is None else noise
        row = self._increments[k]
        terms = [float(row[j]) * self._noises[j] for j in np.flatnonzero(row).tolist()]
        later = self._increments[k + 1 :]
        self._noises = {j: o for j, o in self._noises.items() if later[:, j].any()}
        return reduce(torch.add, terms, x)
