"""Low passes: they keep what is constant, take the finest waves away, and treat every rank and size alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dode_nodes.sampling.bands import LEVELS, low_pass, spatial_axes
from tests.toys import latents

SHAPES = [(3, 16), (3, 8, 8), (3, 7, 5), (3, 1, 1), (3, 2, 3), (2, 4, 6, 5), (2, 1, 1, 9), (5,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", range(LEVELS))
def test_what_is_constant_stays(shape, level):
    x = torch.randn(2, *shape[:1], *[1] * (len(shape) - 1)).expand(2, *shape)
    torch.testing.assert_close(low_pass(x, level), x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_level_0_is_the_latent_itself(shape):
    x = latents(2, *shape)
    assert low_pass(x, 0) is x


def test_the_finest_wave_is_taken_away_and_a_coarse_one_stays():
    """Inside: at an edge a wave does not go on."""
    i = torch.arange(64.0)
    fine, coarse = (-1) ** i, torch.cos(2 * torch.pi * i / 64)
    for level in (1, 2):
        inside = slice(4, -4)
        assert low_pass(fine.reshape(1, 1, 64), level)[..., inside].abs().max() < 1e-6
        assert (low_pass(coarse.reshape(1, 1, 64), level)[0, 0, inside] / coarse[inside])[:8].min() > 0.9


def test_of_a_video_only_the_pictures_are_smoothed():
    x = latents(2, 3, 4, 6, 6)
    frame_by_frame = torch.stack([low_pass(x[:, :, i], 2) for i in range(4)], dim=2)
    torch.testing.assert_close(low_pass(x, 2), frame_by_frame)
    assert list(spatial_axes(x)) == [3, 4]


@given(st.floats(-3, 3), st.floats(-3, 3), st.sampled_from(SHAPES))
def test_it_is_linear(a, b, shape):
    x, y = latents(1, *shape), latents(1, *shape, seed=1)
    torch.testing.assert_close(low_pass(a * x + b * y, 2), a * low_pass(x, 2) + b * low_pass(y, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_what_it_is(dtype):
    x = latents(1, 2, 5, 5).to(dtype)
    smooth = low_pass(x, 2)
    assert smooth.dtype == dtype
    torch.testing.assert_close(smooth.double(), low_pass(x.double(), 2), rtol=0.02, atol=0.2)
