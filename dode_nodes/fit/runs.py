"""Run a sampler over latents: plain, recorded, or replayed from a recording.

Between two network evaluations there are only a few tensor operations. So the sampler's next state can be
computed again for another λ from the recorded outputs, without the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sampling.denoiser import Denoiser, DenoiserProxy, DodeDenoiser, EndOfRun
from ..sampling.solvers import Sampler
from ..tables.row import LambdaRow
from .latents import MicroBatch


@dataclass(frozen=True, eq=False)
class Run:
    """A sampler over a schedule; every call gets fresh copies of all that samplers write into."""

    solver: Sampler
    sigmas: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: LambdaRow, solver: Sampler, dtype: torch.dtype, step: int = 0) -> Run:
        """Of a row's own sampler over its schedule, or from one of its steps on."""
        return cls(solver, torch.tensor(row.sigmas[step:], dtype=dtype), dict(row.solver_options))

    def __call__(self, model: Denoiser, batch: MicroBatch) -> Tensor:
        """The result, ``[m, C, *spatial]``, on the batch's device."""
        return batch.run(lambda extra_args: self.over(model, batch, extra_args), self.sigmas)

    def over(self, model: Denoiser, batch: MicroBatch, extra_args: dict[str, Any]) -> Tensor:
        """The same where the network is ready, or not needed."""
        with torch.no_grad():
            result: Tensor = self.solver(
                model,
                batch.x.clone(),
                self.sigmas.to(batch.x.device, copy=True),
                extra_args=extra_args,
                callback=None,
                disable=True,
                **self.options,
            )
        return result

    def trajectory(
        self, model: Denoiser, batch: MicroBatch, evaluations: Collection[int]
    ) -> tuple[dict[int, Tensor], Tensor]:
        """The states that the numbered evaluations ask about, and the result, on the CPU."""
        noting = _NotingStates(model, evaluations)
        result = self(noting, batch)
        return noting.states, result.cpu()


class _NotingStates(DenoiserProxy):
    def __init__(self, model: Denoiser, evaluations: Collection[int]) -> None:
        super().__init__(model)
        self._evaluations = evaluations
        self._next = 0
        self.states: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        if self._next in self._evaluations:
            self.states[self._next] = _kept(x)
        self._next += 1
        denoised: Tensor = self._model(x, sigma, **extra_args)
        return denoised


class Recording:
    """One micro-batch's run, as far as it has been recorded.

    Attributes:
        batch: the latents.
        states: what each evaluation asked about, ``[m, C, *spatial]``, on the CPU.
        denoised: the network's outputs; the same.
    """

    def __init__(self, run: Run, batch: MicroBatch, prediction: str) -> None:
        self.batch = batch
        self.states: list[Tensor] = []
        self.denoised: list[Tensor] = []
        self._run = run
        self._prediction = prediction

    def evaluate(self, model: Denoiser, corrections: np.ndarray) -> Tensor:
        """Ask the network about the next state and record its output.

        Args:
            model: the denoiser to ask.
            corrections: the triangle c, ``[E, E]``; the rows before this evaluation's must be final.

        Returns:
            The state after, under this evaluation's row of c (see ``next_state``).
        """
        tape = Tape(model, self.denoised, asks=1)
        end = self._end(lambda dode: self._run(dode, self.batch), tape, corrections)
        self.denoised = tape.denoised
        self.states += tape.states
        return end

    def next_state(self, corrections: np.ndarray) -> Tensor:
        """What the sampler asks about after the last recorded output, or its result, on the CPU."""
        tape = Tape(self.batch.group.model, self.denoised, asks=0)
        extra_args = self.batch.extra_args()
        return self._end(lambda dode: self._run.over(dode, self.batch, extra_args), tape, corrections)

    def _end(self, run: Callable[[DodeDenoiser], Tensor], tape: Tape, corrections: np.ndarray) -> Tensor:
        """Where the run comes to, on the CPU."""
        try:
            end = run(DodeDenoiser(tape, corrections, self._prediction))
        except EndOfRun as reached:
            end = reached.x
        return end.cpu()


class Tape(DenoiserProxy):
    """Plays what a network gave in an earlier run, in its place; past that it asks the network and records.

    Args:
        model: the network, as a denoiser.
        played: its first outputs, on any device.
        asks: how often it may be asked; the next time the run is ended. None for as often as there is need.

    Attributes:
        denoised: what was played and what was recorded, on the CPU.
        states: what the network was asked about, on the CPU.
    """

    def __init__(self, model: Denoiser, played: Sequence[Tensor] = (), asks: int | None = None) -> None:
        super().__init__(model)
        self.denoised = list(played)
        self.states: list[Tensor] = []
        self._played = len(self.denoised)
        self._end = None if asks is None else self._played + asks
        self._next = 0

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        k = self._next
        self._next += 1
        if k == self._end:
            raise EndOfRun(x)
        if k < self._played:
            if (skip := getattr(self._model, "skip_evaluation", None)) is not None:
                skip(x, sigma)
            return self.denoised[k].to(x.device, copy=True)  # a sampler may write into it
        denoised: Tensor = self._model(x, sigma, **extra_args)
        self.states.append(_kept(x))
        self.denoised.append(_kept(denoised))
        return denoised


def _kept(x: Tensor) -> Tensor:
    """A copy on the CPU."""
    return x.detach().to("cpu", copy=True)
