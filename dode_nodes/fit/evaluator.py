"""The one place where a fit evaluates the network: it counts, reports progress, and stops at the first NaN."""

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

    def count(self, batch: MicroBatch, stage: str, denoised: Tensor) -> None:
        """Note an evaluation of the micro-batch, and tell. The other ranks are taken to be as far."""
        self._own += len(denoised)
        self._progress.advance(len(denoised) * batch.stand_for, stage, denoised)

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
        denoised: Tensor = self._model(x, sigma, **extra_args)
        if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
            what = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
            raise DodeError(
                f"the model must return the denoised latents, {tuple(x.shape)}; it returned {what}"
            )
        if not denoised.isfinite().all():
            raise NotFinite(
                f"the model returned NaN or infinite values at σ = {float(sigma.flatten()[0]):.6g} "
                f"({self._stage}). If the model runs in half precision, try fp32 or bf16"
            )
        self._evaluator.count(self._batch, self._stage, denoised)
        return denoised
