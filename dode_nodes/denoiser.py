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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DodeError

Denoiser = Callable[..., Tensor]
"""k-diffusion's convention: ``model(x, sigma[B], **extra_args) -> denoised``."""

PREDICTIONS = ("noise", "data")

MAX_EVALUATIONS = 256
"""Of a run with weights: their triangle, expanded per channel, must fit memory whatever a file says."""


def dode_corrections(lambdas: np.ndarray) -> np.ndarray:
    """λ as a lower triangle c of corrections (Eq. 10).

    Args:
        lambdas: ``[E]`` for E network evaluations, or ``[E, C]`` with one λ per channel.

    Returns:
        ``[E, E]``, or ``[E, E, C]``. The first evaluation has no predecessor: its λ has no effect.
    """
    lambdas = np.asarray(lambdas, dtype=np.float64)
    corrections = np.zeros((len(lambdas), *lambdas.shape))
    for k in range(1, len(lambdas)):
        corrections[k, k], corrections[k, k - 1] = lambdas[k], -lambdas[k]
    return corrections


def history_corrections(weights: np.ndarray) -> np.ndarray:
    """Eq. 8's W, ``[E, E]`` or ``[E, E, C]``, as corrections c = W − 1."""
    weights = np.array(weights, dtype=np.float64)
    diagonal = np.arange(len(weights))
    weights[diagonal, diagonal] -= 1
    return weights


def rest_of(corrections: np.ndarray, first: int) -> np.ndarray:
    """The triangle for a run that begins at evaluation ``first``.

    The outputs before it are missing. What they would have weighed goes to the oldest output there is,
    so that every row keeps its sum.
    """
    rest = corrections[first:, first:].copy()
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
        self._model = model

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # not set yet: a copy is being made
            raise AttributeError(name)
        return getattr(self._model, name)


class DodeDenoiser(DenoiserProxy):
    """A denoiser whose every evaluation is corrected by the ones before it.

    One instance serves one run of one sampler.

    Args:
        model: the denoiser to wrap.
        corrections: the triangle c, ``[E, E]`` or per channel ``[E, E, C]``.
        prediction: what an output o is, ``"noise"`` or ``"data"``.
        first: number of the evaluation that this run begins with, when it samples the rest of a
            schedule (see ``rest_of``).
        told_sigmas: ``[E]``, the σ′ to tell the network in place of the σ it is asked at.
    """

    def __init__(
        self,
        model: Denoiser,
        corrections: np.ndarray,
        prediction: str,
        *,
        first: int = 0,
        told_sigmas: np.ndarray | None = None,
    ) -> None:
        super().__init__(model)
        self._corrections = rest_of(corrections, first)
        self._noise = prediction == "noise"
        self._told_sigmas = None if told_sigmas is None else told_sigmas[first:]
        self._outputs: dict[int, Tensor] = {}  # o_j, of the evaluations that a later one refers to
        self._last_use = [_last_nonzero(column) for column in np.moveaxis(self._corrections, 1, 0)]
        self._next = 0

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        k = self._next
        if k >= len(self._corrections):
            raise DodeError(
                f"the sampler asks the network more often than the {k} times that there are weights for: "
                "it does not take the steps that it was distilled on"
            )
        self._next += 1
        if self._told_sigmas is None:
            denoised = self._model(x, sigma, **extra_args)
        else:
            denoised = self._denoised_told(float(self._told_sigmas[k]), x, sigma, extra_args)

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

    def _denoised_told(self, told: float, x: Tensor, sigma: Tensor, extra_args: dict[str, Any]) -> Tensor:
        """D for which (x − D)/σ is the noise that the network sees at σ′."""
        denoised = self._model(x, torch.full_like(sigma, told), **extra_args)
        return (x - over_latent(sigma / told, x) * (x - denoised)).to(x.dtype)

    def _correction(self, k: int, output: Tensor) -> Tensor:
        """ô_k − o_k = Σ_j<k c_kj (o_j − o_k) + (Σ_j c_kj) o_k; D-ODE's last sum is 0."""
        return reduce(torch.add, self._terms(k, output))

    def _terms(self, k: int, output: Tensor) -> Iterator[Tensor]:
        """One at a time: each is as large as a latent."""
        row = self._corrections[k]
        for j in range(k):
            if np.any(row[j]):
                yield _factor(row[j], output) * (self._outputs[j] - output)
        if np.any(total := row.sum(axis=0)):
            yield _factor(total, output) * output


def _last_nonzero(column: np.ndarray) -> int:
    """The last evaluation that one output weighs in; −1 for none. ``[E]`` or ``[E, C]``."""
    used = np.flatnonzero(column.reshape(len(column), -1).any(axis=1))
    return int(used[-1]) if len(used) else -1


def _factor(weight: np.ndarray, output: Tensor) -> float | Tensor:
    """A weight as a number, or per channel as ``[1, C, 1, …]``."""
    if weight.ndim == 0:
        return float(weight)
    return output.new_tensor(weight).reshape(1, -1, *(1,) * (output.ndim - 2))
