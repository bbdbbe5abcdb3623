"""Outputs without the network: a Gaussian denoiser that is the ideal one of its prior, and the start of a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dode_nodes.sampling.free_outputs import FreeTerms, fitted_prior, gaussian_denoised, unit_variance
from dode_nodes.tables.free_outputs import FreeOutputs, GaussianPrior
from tests.oracles import Gaussian
from tests.toys import latents

ALIKE = GaussianPrior(np.full(2, 0.3), np.repeat(0.25 * np.eye(2)[None], 4, axis=0))
"""White, with the mean and spread of the oracle."""
SIZES = [(2, 16), (2, 8, 8), (2, 5, 7), (2, 1, 1), (2, 3, 6, 4)]


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_of_white_pictures_it_is_the_closed_form(size, flow):
    sigma = 0.7
    x = latents(3, *size, sigma=1.0)
    expected = Gaussian(flow)(x, torch.full((3,), sigma, dtype=torch.float64))
    torch.testing.assert_close(
        gaussian_denoised(ALIKE, x, sigma, flow=flow), expected, rtol=1e-10, atol=1e-10
    )


MIXED = torch.tensor([[0.3, 0.0], [0.18, 0.15]], dtype=torch.float64)
"""Two channels, alike in part."""


def _fall(side):
    f = torch.fft.fftfreq(side, dtype=torch.float64)
    return 1 / (0.1 + (f[:, None] ** 2 + f[None] ** 2).sqrt())


def _smooth_pictures(count, side, seed=0):
    """With a falling spectrum."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, 2, side, side, generator=generator, dtype=torch.float64)
    smooth = torch.fft.ifft2(torch.fft.fft2(white) * _fall(side)).real
    return torch.einsum("cd,bdyx->bcyx", MIXED, smooth) + 0.2


def _best_denoised(noisy, sigma):
    """Wiener's filter for the spectrum that the pictures were made with."""
    spectrum = _fall(noisy.shape[-1])[..., None, None] ** 2 * (MIXED @ MIXED.T)
    gain = torch.linalg.solve(spectrum + sigma**2 * torch.eye(2, dtype=torch.float64), spectrum)
    waves = torch.fft.fft2(noisy - 0.2)
    return 0.2 + torch.fft.ifft2(torch.einsum("yxdc,bdyx->bcyx", gain.to(waves.dtype), waves)).real


@pytest.mark.parametrize("side", [16, 24])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
def test_fitted_to_pictures_it_denoises_others_of_any_size_nearly_as_well_as_can_be(sigma, side):
    prior = fitted_prior(_smooth_pictures(64, 16))
    pictures = _smooth_pictures(32, side, seed=1)
    noisy = pictures + sigma * latents(32, 2, side, side, sigma=1.0, seed=2)
    denoised = (gaussian_denoised(prior, noisy, sigma, flow=False), _best_denoised(noisy, sigma))
    error, least = (float((each - pictures).square().mean()) for each in denoised)
    assert least <= error < 1.03 * least


def test_the_fitted_spectrum_is_that_of_the_pictures():
    """Summed over the grid, the power is the variance: Parseval."""
    pictures = _smooth_pictures(64, 32)
    prior = fitted_prior(pictures)
    np.testing.assert_allclose(prior.mean, pictures.mean((0, 2, 3)))
    clean = gaussian_denoised(prior, pictures, 1e-6, flow=False)
    torch.testing.assert_close(clean, pictures, rtol=0, atol=1e-6)
    gone = gaussian_denoised(prior, pictures, 1e6, flow=False)
    torch.testing.assert_close(gone.mean((0, 2, 3)), torch.tensor(prior.mean), rtol=0, atol=1e-3)


def test_a_small_picture_leaves_no_frequency_without_a_value():
    prior = fitted_prior(_smooth_pictures(8, 4), knots=12)
    assert prior.spectrum.shape == (12, 2, 2)
    assert (np.linalg.eigvalsh(prior.spectrum) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_precision_is_kept(dtype):
    x = latents(2, 2, 8, 8, sigma=1.0).to(dtype)
    denoised = gaussian_denoised(ALIKE, x, 0.7, flow=False)
    assert denoised.dtype == dtype
    torch.testing.assert_close(
        denoised.double(), gaussian_denoised(ALIKE, x.double(), 0.7, flow=False), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize(
    ("sigma", "flow", "scale"),
    [(14.6, False, (1 + 14.6**2) ** 0.5), (1.0, True, 1.0), (0.6, True, (0.16 + 0.36) ** 0.5)],
)
def test_the_start_has_unit_variance(sigma, flow, scale):
    x = latents(2)
    torch.testing.assert_close(unit_variance(x, sigma, flow=flow), x / scale)


def test_columns_are_the_start_then_the_gaussian_denoisers_noise():
    terms = FreeTerms(FreeOutputs(False, True, ALIKE), flow=False)
    begin, later = latents(2), latents(2, seed=1)
    terms.begin(begin, 14.6)
    start, noise = terms.at(later, 2.0)
    torch.testing.assert_close(start, unit_variance(begin, 14.6, flow=False))
    torch.testing.assert_close(later - 2.0 * noise, gaussian_denoised(ALIKE, later, 2.0, flow=False))
