"""The wrapped denoiser: the one equation that turns a deterministic sampler into its D-variant.

A network output o is the denoised D (``prediction="data"``) or the noise (x − D)/σ
(``prediction="noise"``; the velocity, for flow models). Evaluation k hands the sampler

    ô_k = o_k + Σ_j c_kj o_j,    j ≤ k

in place of o_k. D-ODE (Kim et al. 2024, Eq. 10) is c_kk = λ_k, c_k,k−1 = −λ_k; the paper's Eq. 8,
ô_k = Σ_j W_kj o_j, is c = W − 1. Written as a correction of the stock output, c = 0 *is* the stock
sampler, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from .errors import DodeError

Denoiser = Callable[..., Tensor]
"""k-diffusion's convention: ``model(x, sigma[B], **extra_args) -> denoised``."""

PREDICTIONS = ("noise", "data")


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


def over_latent(value: Tensor, x: Tensor) -> Tensor:
    """Append axes to a value per latent, ``[B]``, until it broadcasts over ``x``, ``[B, C, *spatial]``."""
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


class DenoiserProxy:
    """Stands before a denoiser and lends its attributes.

    Samplers of the hosts look behind the call: ``model.inner_model``, …
    """

    def __init__(self, model: Denoiser) -> None:
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
            schedule. Earlier outputs are missing then; the weight they would have had goes to the
            oldest output there is, so that the sum over the row stays what it was.
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
        self._corrections = corrections
        self._noise = prediction == "noise"
        self._first = self._next = first
        self._told_sigmas = told_sigmas
        self._outputs: dict[int, Tensor] = {}  # o_j, of the evaluations that a later one refers to

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        k = self._next
        if k >= len(self._corrections):
            raise DodeError(
                f"the sampler asked for network evaluation {k + 1}, but there are weights for "
                f"{len(self._corrections)}: it does not ask the σ that it was distilled on"
            )
        self._next += 1
        if self._told_sigmas is None:
            denoised = self._model(x, sigma, **extra_args)
        else:
            denoised = self._denoised_told(k, x, sigma, extra_args)
        if not self._corrections[self._first :].any():
            return denoised

        output = (x - denoised) / over_latent(sigma, x) if self._noise else denoised
        correction = self._correction(k, output)
        self._remember(k, output)
        if correction is None:
            return denoised
        return denoised - over_latent(sigma, x) * correction if self._noise else denoised + correction

    def _denoised_told(self, k: int, x: Tensor, sigma: Tensor, extra_args: dict[str, Any]) -> Tensor:
        """D for which (x − D)/σ is the noise that the network sees at σ′."""
        told = sigma.new_full(sigma.shape, float(self._told_sigmas[k]))
        denoised = self._model(x, told, **extra_args)
        return x - over_latent(sigma / told, x) * (x - denoised)

    def _correction(self, k: int, output: Tensor) -> Tensor | None:
        """ô_k − o_k = (Σ_j c_kj) o_k + Σ_j c_kj (o_j − o_k); None where it is zero."""
        row = self._corrections[k, : k + 1]
        oldest = self._first
        weights = {j: row[j] for j in range(oldest, k)}
        if oldest < k:
            weights[oldest] = row[: oldest + 1].sum(axis=0)  # the missing ones' weight, too
        terms = [
            self._factor(w, output) * (self._outputs[j] - output) for j, w in weights.items() if np.any(w)
        ]
        excess = row.sum(axis=0)
        if np.any(excess):
            terms.append(self._factor(excess, output) * output)
        return sum(terms[1:], start=terms[0]) if terms else None

    def _remember(self, k: int, output: Tensor) -> None:
        """Keep what later evaluations refer to, forget the rest."""
        self._outputs[k] = output
        later = self._corrections[k + 1 :]
        for j in list(self._outputs):
            needed = later[:, : j + 1] if j == self._first else later[:, j]
            if not needed.any():
                del self._outputs[j]

    @staticmethod
    def _factor(weight: np.ndarray, output: Tensor) -> float | Tensor:
        """A weight as a number, or per channel as ``[1, C, 1, …]``."""
        if weight.ndim == 0:
            return float(weight)
        return output.new_tensor(weight).reshape(1, -1, *(1,) * (output.ndim - 2))
