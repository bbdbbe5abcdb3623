"""Images survive the way to latents and back."""

from __future__ import annotations

import pytest
import torch

from dode_nodes.demo.vae import decode, decode_to_picture, encode


def test_round_trip_of_a_picture_is_exact_to_the_bit():
    images = torch.arange(257).repeat(4)[:1024].view(4, 1, 16, 16) / 256
    assert torch.equal(decode(encode(images)), images)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-7), (torch.float64, 4e-16)])
def test_round_trip_of_any_image_is_exact_to_rounding(dtype, rounding):
    images = torch.rand(3, 1, 10, 24, dtype=dtype)
    torch.testing.assert_close(decode(encode(images)), images, rtol=0, atol=rounding)


def test_round_trip_of_latents_beyond_the_pictures():
    latents = 5 * torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(encode(decode(latents)), latents)


def test_a_latent_holds_the_four_pixels_of_a_square():
    image = torch.zeros(1, 1, 16, 16)
    image[..., 4:6, 6:8] = 1  # the square of the latent's row 2, column 3
    latent = encode(image)
    bright = latent > latent.min()
    assert bright.sum() == 4
    assert bright[0, :, 2, 3].all()


def test_only_a_picture_is_clamped():
    latents = encode(torch.tensor([-1.0, 2.0]).repeat(128).view(1, 1, 16, 16))
    assert decode(latents).min() == -1
    assert decode_to_picture(latents).unique().tolist() == [0, 1]
