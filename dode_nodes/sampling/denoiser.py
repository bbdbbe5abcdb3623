"""The wrapped denoiser: the one equation that turns a deterministic sampler into its D-variant.

A network output o is the denoised D (``prediction="data"``) or the noise (x − D)/σ
(``prediction="noise"``; the velocity, for flow models). Evaluation k hands the sampler

    ô_k = o_k + Σ_j c_kj o_j,    j ≤ k

in place of o_k. D-ODE (Kim et al. 2024, Eq. 10) is c_kk = λ_k, c_k,k−1 = −λ_k; the paper's Eq. 8,
ô_k = Σ_j W_kj o_j, is c = W − 1. Written as a correction of the stock output, c = 0 *is* the stock
sampler, bit for bit.

Corrections may differ between bands of spatial frequency, ô_k = o_k + Σ_p L_p Σ_j c_pkj o_j with low passes L_p
(``bands``), and may weigh outputs that cost no evaluation (``free_outputs``), in columns of their own before the
network's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DodeError
from ..tables.free_outputs import NONE, FreeOutputs
from .bands import low_pass
from .free_outputs import FreeTerms

if TYPE_CHECKING:
    from ..tables.row import LambdaRow

Denoiser = Callable[..., Tensor]
"""k-diffusion's convention: ``model(x, sigma[B], **extra_args) -> denoised``."""

Held = Callable[[Tensor], Tensor]
"""``held(sigma[B])``, bool, which broadcasts over the latents: where a mask keeps what is there at this σ, or a part of
it. There the plain sampler runs: weights are fitted for what the sampler alone decides."""


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
    """Eq. 8's W, ``[E, E]`` or ``[P, E, F + E]``, as corrections c of the same shape: 1 less on the diagonal."""
    corrections: np.ndarray = weights - _identity(weights.shape)
    return corrections


def history_weights(corrections: np.ndarray) -> np.ndarray:
    """The inverse of ``history_corrections``."""
    weights: np.ndarray = corrections + _identity(corrections.shape)
    return weights


def _identity(shape: tuple[int, ...]) -> np.ndarray:
    """The weights of the plain sampler: every evaluation's own output."""
    identity = np.zeros(shape)
    whole = identity if len(shape) == 2 else identity[0]
    whole += np.eye(shape[-2], shape[-1], shape[-1] - shape[-2])
    return identity


def row_corrections(row: LambdaRow) -> np.ndarray:
    """A row's weights as corrections c, ``[E, E]`` or ``[P, E, F + E]``."""
    return (dode_corrections if row.form == "lambda" else history_corrections)(row.weights)


def rest_of(corrections: np.ndarray, first: int, free: FreeOutputs = NONE) -> tuple[np.ndarray, FreeOutputs]:
    """The corrections, ``[P, E, F + E]``, for a run that begins at evaluation ``first``.

    The outputs before it are missing, and so is the start of the whole run. What they would have weighed goes to
    the oldest output there is, so that every row keeps its sum.
    """
    if first == 0:
        return corrections, free
    columns = free.columns
    start, own = int(free.start), columns + first
    rest: np.ndarray = np.delete(corrections[:, first:], [*range(start), *range(columns, own)], axis=2)
    missing = corrections[:, first:, :start].sum(axis=2) + corrections[:, first:, columns:own].sum(axis=2)
    rest[:, :, columns - start] += missing
    return rest, replace(free, first=False, start=False)


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
        corrections: the triangle c, ``[E, E]``, or one per low pass with columns for free outputs,
            ``[P, E, F + E]``.
        prediction: what an output o is, ``"noise"`` or ``"data"``.
        first: number of the evaluation that this run begins with, when it samples the rest of a
            schedule (see ``rest_of``).
        free: outputs that cost no evaluation; only of noise.
        flow: whether noise and pictures are interpolated; free outputs ask.
        held: tells which numbers of the latents a mask holds or blends at a σ; see `Held`.
    """

    def __init__(
        self,
        model: Denoiser,
        corrections: np.ndarray,
        prediction: str,
        *,
        first: int = 0,
        free: FreeOutputs = NONE,
        flow: bool = False,
        held: Held | None = None,
    ) -> None:
        super().__init__(model)
        self._held = held
        self._was_free: Tensor | None = None
        planes = corrections[None] if corrections.ndim == 2 else corrections
        self._corrections, self._free = rest_of(planes, first, free)
        self._terms = FreeTerms(self._free, flow=flow)
        self._noise = prediction == "noise"
        self._outputs: dict[int, Tensor] = {}  # o_j, of the evaluations that a later one refers to
        own = self._corrections[:, :, self._free.columns :]
        self._last_use = [_last_nonzero(own[:, :, j]) for j in range(own.shape[2])]
        self._next = 0

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        k = self._next
        evaluations = self._corrections.shape[1]
        if k >= evaluations:
            raise DodeError(
                f"the sampler evaluates the network more than {evaluations} times, but there are weights for "
                f"{evaluations} evaluations: it does not take the steps it was distilled for"
            )
        self._next += 1
        if k == 0:
            self._terms.begin(x, float(sigma[0]))
        denoised = self._denoised(k, x, sigma, extra_args)
        corrected, referred_to = self._corrections[:, k].any(), self._last_use[k] > k
        if not corrected and not referred_to:
            return denoised

        output = (x - denoised) / over_latent(sigma, x) if self._noise else denoised
        is_free = self._set_free(output, sigma)
        if corrected:
            correction = self._correction(k, output, self._terms.at(x, float(sigma[0])))
            if is_free is not None:
                correction = correction * is_free
            if self._noise:
                correction = -over_latent(sigma, x) * correction
            # A σ of more bits than x must not widen the state of the sampler.
            denoised = (denoised + correction).to(torch.promote_types(x.dtype, denoised.dtype))
        self._outputs[k] = output
        self._outputs = {j: o for j, o in self._outputs.items() if self._last_use[j] > k}
        return denoised

    def _set_free(self, output: Tensor, sigma: Tensor) -> Tensor | None:
        """Which numbers are corrected; None for all. What is set free now has this output for all earlier ones: its run
        begins here (see ``rest_of``)."""
        if self._held is None:
            return None
        is_free = ~self._held(sigma)
        begins = is_free if self._was_free is None else is_free & ~self._was_free
        self._outputs = {j: torch.where(begins, output, o) for j, o in self._outputs.items()}
        self._was_free = is_free
        return is_free

    def _denoised(self, k: int, x: Tensor, sigma: Tensor, extra_args: dict[str, Any]) -> Tensor:
        """The network's answer, or what stands for it."""
        if k == 0 and self._free.first:
            return x - over_latent(sigma, x) * self._terms.first(x, float(sigma[0]))
        denoised: Tensor = self._model(x, sigma, **extra_args)
        return denoised

    def _correction(self, k: int, output: Tensor, free: Sequence[Tensor]) -> Tensor:
        """ô_k − o_k, low pass by low pass."""
        columns = {**dict(enumerate(free)), **{len(free) + j: o for j, o in self._outputs.items()}}
        bands = [
            low_pass(reduce(torch.add, _terms(row[: len(free) + k + 1], columns, output)), level)
            for level, row in enumerate(self._corrections[:, k])
            if row.any()
        ]
        return reduce(torch.add, bands)


def _terms(weights: np.ndarray, earlier: Mapping[int, Tensor], output: Tensor) -> Iterator[Tensor]:
    """Of Σ_j<k c_kj (o_j − o_k) + (Σ_j c_kj) o_k, one at a time: each is as large as a latent. The last of the weights
    is o_k's own; D-ODE's last sum is 0."""
    for j in np.flatnonzero(weights[:-1]).tolist():
        yield float(weights[j]) * (earlier[j] - output)
    if total := float(weights.sum()):
        yield total * output


def _last_nonzero(column: np.ndarray) -> int:
    """The last evaluation that one output weighs in; −1 for none. ``[P, E]``."""
    used = np.flatnonzero(column.any(axis=0))
    return int(used[-1]) if len(used) else -1
