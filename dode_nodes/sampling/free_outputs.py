"""Outputs that cost no evaluation of the network: the start of a run, and a Gaussian denoiser's."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..tables.free_outputs import FreeOutputs, GaussianPrior
from .bands import spatial_axes


def unit_variance(x: Tensor, sigma: float, *, flow: bool) -> Tensor:
    """A noisy state at the scale of its noise, as if pictures had unit variance."""
    return x / float(np.hypot(_picture(sigma, flow), sigma))


def gaussian_denoised(prior: GaussianPrior, x: Tensor, sigma: float, *, flow: bool) -> Tensor:
    """E[x0 | x] for x0 of the prior and x = x0 + σ·noise, for flow models (1 − σ)·x0 + σ·noise.

    With a = 1, or 1 − σ: D = μ + F⁻¹ a S (a² S + σ²)⁻¹ F (x − a μ), F the Fourier transform over the spatial
    axes. The factor is computed at the prior's frequencies and is linear between them.

    Args:
        prior: of as many channels.
        x: ``[B, C, *spatial]``, any size.
        sigma: of all of them.
    """
    a = _picture(sigma, flow)
    noisy = a**2 * prior.spectrum + sigma**2 * np.eye(len(prior.mean))
    gain = a * np.linalg.solve(noisy, prior.spectrum)  # symmetric, like both of its factors
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = torch.tensor(prior.mean, dtype=wide, device=x.device).reshape(-1, *[1] * (x.ndim - 2))
    axes = list(spatial_axes(x))
    if not axes:
        return x
    hats = _hats(tuple(x.shape[axis] for axis in axes), len(prior.spectrum)).to(mean)
    per_frequency = torch.einsum("kcd,k...->cd...", torch.tensor(gain).to(mean), hats)
    waves = torch.fft.rfftn(x.to(wide) - a * mean, dim=axes, norm="ortho")
    waves = torch.einsum("cd...,bd...->bc...", per_frequency.to(waves.dtype), waves)
    sizes = [x.shape[axis] for axis in axes]
    denoised: Tensor = mean + torch.fft.irfftn(waves, s=sizes, dim=axes, norm="ortho")
    return denoised.to(x.dtype)


def fitted_prior(pictures: Tensor, knots: int = 12) -> GaussianPrior:
    """The prior of these pictures' latents, ``[B, C, *spatial]``."""
    x = pictures.double()
    mean = x.transpose(0, 1).flatten(1).mean(1)
    axes = list(spatial_axes(x))
    if x.ndim == 5:
        x = x.transpose(1, 2).flatten(0, 1)
        axes = list(spatial_axes(x))
    x = x - mean.reshape(-1, *[1] * (x.ndim - 2))
    waves = torch.fft.rfftn(x, dim=axes, norm="ortho").flatten(2)
    power = torch.einsum("bcf,bdf->cdf", waves, waves.conj()).real / len(x)
    hats = _hats(tuple(x.shape[axis] for axis in axes), knots).flatten(1)
    return GaussianPrior(mean.numpy(), _smooth(power.numpy(), hats.numpy()))


def _smooth(power: np.ndarray, hats: np.ndarray) -> np.ndarray:
    """Power per frequency, ``[C, C, F]``, as means around the knots, ``[K, C, C]``; where a small picture has no
    frequency near a knot, what lies between its neighbours."""
    weight = hats.sum(1)
    seen = np.flatnonzero(weight > 1e-9)
    means = np.einsum("cdf,kf->kcd", power, hats[seen]) / weight[seen, None, None]
    knots = np.arange(len(hats))
    flat = [np.interp(knots, seen, column) for column in means.reshape(len(seen), -1).T]
    return np.stack(flat, axis=1).reshape(len(hats), *power.shape[:2])


@lru_cache(maxsize=8)
def _hats(sizes: tuple[int, ...], knots: int) -> Tensor:
    """How much of each frequency, ``[K, *frequencies]``, belongs to each knot: they sum to 1."""
    per_axis = [torch.fft.fftfreq(size, dtype=torch.float64) for size in sizes[:-1]]
    per_axis.append(torch.fft.rfftfreq(sizes[-1], dtype=torch.float64))
    squares = [grid.square() for grid in torch.meshgrid(*per_axis, indexing="ij")]
    radius = (torch.stack(squares).sum(0) / (len(sizes) / 4)).sqrt()  # of the highest there is, 0 to 1
    place = radius.sqrt() * (knots - 1)
    return (
        1 - (place - torch.arange(knots, dtype=torch.float64).reshape(-1, *[1] * len(sizes))).abs()
    ).clamp(0)


def _picture(sigma: float, flow: bool) -> float:
    """The factor of x0 in a noisy state."""
    return 1 - sigma if flow else 1.0


class FreeTerms:
    """The free outputs of one run, as noise.

    Args:
        which: of them.
        flow: whether noise and pictures are interpolated.
    """

    def __init__(self, which: FreeOutputs, *, flow: bool) -> None:
        self._which = which
        self._flow = flow
        self._start: list[Tensor] = []

    def begin(self, x: Tensor, sigma: float) -> None:
        """The run's first state."""
        if self._which.start:
            self._start = [unit_variance(x, sigma, flow=self._flow)]

    def at(self, x: Tensor, sigma: float) -> list[Tensor]:
        """Those with weights of their own, at an evaluation, in the order of their columns."""
        return self._start if self._which.gaussian is None else [*self._start, self._gaussian(x, sigma)]

    def first(self, x: Tensor, sigma: float) -> Tensor:
        """In place of the network's first output."""
        if self._which.gaussian is None:
            return unit_variance(x, sigma, flow=self._flow)
        return self._gaussian(x, sigma)

    def _gaussian(self, x: Tensor, sigma: float) -> Tensor:
        assert self._which.gaussian is not None  # noqa: S101  # who calls has looked
        return (x - gaussian_denoised(self._which.gaussian, x, sigma, flow=self._flow)) / sigma
