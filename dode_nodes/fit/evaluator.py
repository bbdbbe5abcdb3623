"""The one place where a fit evaluates the network: it counts, reports progress, stops at the first NaN,
and goes on in smaller parts where memory runs out."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DodeError, NotFinite
from ..sampling.denoiser import Denoiser, DenoiserProxy
from .latents import MicroBatch
from .progress import Progress
from .ranks import sum_over_ranks


class Evaluator:
    """Evaluates networks.

    Args:
        progress: what the evaluations are counted towards.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._own = 0

    def on(self, batch: MicroBatch, stage: str) -> Denoiser:
        """The micro-batch's denoiser, watched; ``stage`` says what it is evaluated for."""
        return _Watched(self, batch, stage)

    def count(self, batch: MicroBatch, stage: str, denoised: Tensor, times: int = 1) -> None:
        """Note an evaluation of the micro-batch, or what takes as long as so many, and tell. The other ranks are taken
        to be as far."""
        evaluations = times * len(denoised)
        self._own += evaluations
        self._progress.advance(evaluations * batch.stand_for, stage, denoised.detach())

    def credit(self, evaluations: int) -> None:
        """Count evaluations of an earlier run, whose results are known."""
        self._own += evaluations

    def spent(self) -> int:
        """Evaluations of one latent each that went through this, of all ranks; every rank must call it."""
        return int(sum_over_ranks(np.array(self._own)))


class _Watched(DenoiserProxy):
    def __init__(self, evaluator: Evaluator, batch: MicroBatch, stage: str) -> None:
        super().__init__(batch.group.model)
        self._evaluator = evaluator
        self._batch = batch
        self._stage = stage

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        sigma = sigma.expand(len(x))

        def ask(part: slice) -> Tensor:
            args = self._batch.arguments_of(part, extra_args)
            return self._checked(self._model(x[part], sigma[part], **args), x[part], float(sigma[0]))

        def count(denoised: Tensor) -> None:
            self._evaluator.count(self._batch, self._stage, denoised)

        return self._batch.limit.evaluate(x, ask, count)

    def _checked(self, denoised: object, x: Tensor, sigma: float) -> Tensor:
        """The model's answer about ``x``, if it is one."""
        if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
            what = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
            raise DodeError(
                f"the model must return the denoised latents, {tuple(x.shape)}; it returned {what}"
            )
        if not denoised.isfinite().all():
            raise NotFinite(
                f"the model returned NaN or infinite values at σ = {sigma:.6g} "
                f"({self._stage}). If the model runs in half precision, try fp32 or bf16"
            )
        return denoised
