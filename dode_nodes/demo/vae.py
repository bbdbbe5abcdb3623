"""The demo's VAE: turns images into latents and back, without loss.

A latent's four channels are the four pixels of a 2×2 square (pixel-unshuffle), shifted and scaled so that
the digits' mean is about 0 and their standard deviation about 1.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

# Sixteenths and a whole number: in float32 the round trip of a picture in steps of 1/256 is exact to the bit.
SHIFT = 5 / 16
SCALE = 3.0


def encode(images: Tensor) -> Tensor:
    """Latents (B, 4, H/2, W/2) of images (B, 1, H, W) in [0, 1], with even H and W."""
    return functional.pixel_unshuffle((images - SHIFT) * SCALE, 2)


def decode(latents: Tensor) -> Tensor:
    """The inverse of `encode`, for any latents: nothing is clamped, so images may leave [0, 1]."""
    return functional.pixel_shuffle(latents, 2) / SCALE + SHIFT


def decode_to_picture(latents: Tensor) -> Tensor:
    """`decode`, clamped to [0, 1]: what is shown, and what the classifier judges."""
    return decode(latents).clamp(0, 1)
