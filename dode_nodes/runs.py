"""Run a sampler over latents: as it is, recorded, or replayed over what was recorded.

Everything between two network evaluations is a few tensor operations, so the state that a sampler
asks about next can be had again, for another λ, from the outputs recorded so far: no network needed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .denoiser import Denoiser, DenoiserProxy, DodeDenoiser
from .groups import MicroBatch
from .solvers import Sampler


@dataclass(frozen=True)
class Run:
    """A sampler over a schedule; every call gets fresh copies of all that samplers write into."""

    solver: Sampler
    sigmas: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, model: Denoiser, batch: MicroBatch) -> Tensor:
        """The result, ``[m, C, *spatial]``, on the batch's device."""
        with torch.no_grad():
            return self.solver(
                model,
                batch.x.clone(),
                self.sigmas.to(batch.x.device, copy=True),
                extra_args=batch.extra_args(),
                callback=None,
                disable=True,
                **self.options,
            )

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
            self.states[self._next] = x.detach().cpu().clone()
        self._next += 1
        return self._model(x, sigma, **extra_args)


class Recording:
    """One micro-batch's run, as far as its network outputs are recorded (on the CPU).

    Attributes:
        states: what each recorded evaluation asked about.
    """

    def __init__(self, run: Run, batch: MicroBatch, prediction: str) -> None:
        self.batch = batch
        self.states: list[Tensor] = []
        self._run = run
        self._prediction = prediction
        self._denoised: list[Tensor] = []

    def evaluate(self, model: Denoiser, corrections: np.ndarray) -> Tensor:
        """Ask the network about the next state and record its output.

        Args:
            model: the denoiser to ask.
            corrections: the triangle c, ``[E, E]``; the rows before this evaluation's must be final.

        Returns:
            The state after, under this evaluation's row of c (see ``next_state``).
        """
        return self._replay(corrections, _Tape(model, self, may_ask=True))

    def next_state(self, corrections: np.ndarray) -> Tensor:
        """What the sampler asks about after the last recorded output, or its result, on the CPU."""
        return self._replay(corrections, _Tape(self.batch.group.model, self, may_ask=False))

    def _replay(self, corrections: np.ndarray, tape: _Tape) -> Tensor:
        try:
            return self._run(DodeDenoiser(tape, corrections, self._prediction), self.batch).cpu()
        except _Reached as reached:
            return reached.x.cpu()


class _Reached(Exception):
    """The sampler asks about a state past the end of the record."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class _Tape(DenoiserProxy):
    """Plays a recording; past its end it may ask the network once, then it ends the run."""

    def __init__(self, model: Denoiser, recording: Recording, may_ask: bool) -> None:
        super().__init__(model)
        self._recording = recording
        self._may_ask = may_ask
        self._next = 0

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        denoised = self._recording._denoised
        k = self._next
        self._next += 1
        if k < len(denoised):
            return denoised[k].to(x.device)
        if not self._may_ask:
            raise _Reached(x)
        self._may_ask = False
        output = self._model(x, sigma, **extra_args)
        self._recording.states.append(x.detach().cpu().clone())
        denoised.append(output.detach().cpu())
        return output
