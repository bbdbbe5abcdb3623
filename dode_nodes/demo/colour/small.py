"""The small model's pictures: 16×16 pixels, shifted and scaled to a mean of about 0 and a deviation of about 1."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

_SHIFT, _SCALE = 0.5, 2.5


def shrink(pictures: Tensor) -> Tensor:
    """What the small model is trained on, (B, 3, H/4, W/4), of pictures (B, 3, H, W) in [−1, 1]."""
    return (functional.avg_pool2d(pictures, 4) - _SHIFT) * _SCALE


def to_pixels(latents: Tensor) -> Tensor:
    """Pictures of their own size in about [−1, 1]; nothing is clamped."""
    return latents / _SCALE + _SHIFT
