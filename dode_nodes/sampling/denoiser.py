"""The wrapped denoiser: the one equation that turns a deterministic sampler into its D-variant.

A network output o is the denoised D (``prediction="data"``) or the noise (x − D)/σ
(``prediction="noise"``; the velocity, for flow models). Evaluation k hands the sampler

    ô_k = o_k + Σ_j c_kj o_j,    j ≤ k

in place of o_k. D-ODE (Kim et al. 2024, Eq. 10) is c_kk = λ_k, c_k,k−1 = −λ_k; the paper's Eq. 8,
ô_k = Σ_j W_kj o_j, is c = W − 1. Written as a correction of the stock output, c = 0 *is* the stock
sampler, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DodeError

if TYPE_CHECKING:
    from ..tables.row import LambdaRow

Denoiser = Callable[..., Tensor]
"""k-diffusion's convention: ``model(x, sigma[B], **extra_args) -> denoised``."""


def dode_corrections(lambdas: np.ndarray) -> np.ndarray:
    """λ, ``[E]``, as a lower triangle c of corrections, ``[E, E]`` (Eq. 10).

    The first evaluation has no predecessor: its λ has no effect.
    """
    lambdas = np.asarray(lambdas, dtype=np.float64)
    corrections = np.zeros((len(lambdas), len(lambdas)))
    for k in range(1, len(lambdas)):
        corrections[k, k], corrections[k, k - 1] = lambdas[k], -lambdas[k]
    return corrections


def history_corrections(weights: np.ndarray) -> np.ndarray:
    """Eq. 8's W, ``[E, E]``, as corrections c = W − 1."""
    return np.asarray(weights, dtype=np.float64) - np.eye(len(weights))


def row_corrections(row: LambdaRow) -> np.ndarray:
    """A row's weights as a triangle c, ``[E, E]``."""
    return (dode_corrections if row.form == "lambda" else history_corrections)(row.weights)


def rest_of(corrections: np.ndarray, first: int) -> np.ndarray:
    """The triangle for a run that begins at evaluation ``first``.

    The outputs before it are missing. What they would have weighed goes to the oldest output there is,
    so that every row keeps its sum.
    """
    rest: np.ndarray = corrections[first:, first:].copy()
    rest[:, 0] += corrections[first:, :first].sum(axis=1)
    return rest


def over_latent(value: Tensor, x: Tensor) -> Tensor:
    """Append axes to a value per latent, ``[B]``, until it broadcasts over ``x``, ``[B, C, *spatial]``."""
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


class EndOfRun(BaseException):
    """How a denoiser of ours ends the run of the sampler that asks it, at the state it asks about.

    Not an error, and not an ``Exception``: a sampler that handles those must let it pass.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x


class DenoiserProxy:
    """Stands before a denoiser and lends its attributes.

    Samplers of the hosts look behind the call: ``model.inner_model``, …
    """

    def __init__(self, model: Denoiser | None) -> None:
        self._model: Any = model

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # not set yet: a copy is being made
            raise AttributeError(name)
        return getattr(self._model, name)


class DodeDenoiser(DenoiserProxy):
    """A denoiser whose every evaluation is corrected by the ones before it.

    One instance serves one run of one sampler.

    Args:
        model: the denoiser to wrap.
        corrections: the triangle c, ``[E, E]``.
        prediction: what an output o is, ``"noise"`` or ``"data"``.
        first: number of the evaluation that this run begins with, when it samples the rest of a
            schedule (see ``rest_of``).
    """

    def __init__(self, model: Denoiser, corrections: np.ndarray, prediction: str, *, first: int = 0) -> None:
        super().__init__(model)
        self._corrections = rest_of(corrections, first)
        self._noise = prediction == "noise"
        self._outputs: dict[int, Tensor] = {}  # o_j, of the evaluations that a later one refers to
        self._last_use = [_last_nonzero(column) for column in self._corrections.T]
        self._next = 0

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        k = self._next
        if k >= len(self._corrections):
            raise DodeError(
                f"the sampler evaluates the network more than {k} times, but there are weights for {k} evaluations: "
                "it does not take the steps it was distilled for"
            )
        self._next += 1
        denoised: Tensor = self._model(x, sigma, **extra_args)
        corrected, referred_to = self._corrections[k].any(), self._last_use[k] > k
        if not corrected and not referred_to:
            return denoised

        output = (x - denoised) / over_latent(sigma, x) if self._noise else denoised
        if corrected:
            correction = self._correction(k, output)
            if self._noise:
                correction = -over_latent(sigma, x) * correction
            # A σ of more bits than x must not widen the state of the sampler.
            denoised = (denoised + correction).to(torch.promote_types(x.dtype, denoised.dtype))
        self._outputs[k] = output
        self._outputs = {j: o for j, o in self._outputs.items() if self._last_use[j] > k}
        return denoised

    def _correction(self, k: int, output: Tensor) -> Tensor:
        """ô_k − o_k = Σ_j<k c_kj (o_j − o_k) + (Σ_j c_kj) o_k; D-ODE's last sum is 0."""
        return reduce(torch.add, self._terms(k, output))

    def _terms(self, k: int, output: Tensor) -> Iterator[Tensor]:
        """One at a time: each is as large as a latent."""
        row = self._corrections[k]
        for j in np.flatnonzero(row[:k]):
            yield float(row[j]) * (self._outputs[int(j)] - output)
        if total := float(row.sum()):
            yield total * output


def _last_nonzero(column: np.ndarray) -> int:
    """The last evaluation that one output weighs in; −1 for none. ``[E]``."""
    used = np.flatnonzero(column)
    return int(used[-1]) if len(used) else -1
