"""Low passes over the spatial axes, by which weights may differ between bands of spatial frequency.

Level 0 is the latent itself; each level above smooths the one before with the binomial (1, 2, 1)/4, its taps
twice as far apart from level to level (the à trous scheme: Holschneider et al. 1989). Weights a, b, c over levels
0, 1, 2 are weights a, a + b, a + b + c for the three bands, fine to coarse, which sum to the latent exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 3
"""At most: bands finer than that gained nothing."""


def low_pass(x: Tensor, level: int) -> Tensor:
    """Level ``level`` of a latent, ``[B, C, *spatial]``; of a video's axes, the last two are smoothed."""
    for i in range(level):
        for axis in spatial_axes(x):
            x = _smoothed(x, axis, 2**i)
    return x


def spatial_axes(x: Tensor) -> range:
    """The axes of a latent over which it is a picture, or a sound: at most the last two."""
    return range(max(2, x.ndim - 2), x.ndim)


def _smoothed(x: Tensor, axis: int, distance: int) -> Tensor:
    """(1, 2, 1)/4 along one axis; beyond the edge, the edge goes on."""
    last = x.shape[axis] - 1
    here = torch.arange(last + 1, device=x.device)
    before = x.index_select(axis, (here - distance).clamp(min=0))
    after = x.index_select(axis, (here + distance).clamp(max=last))
    return (before + after) / 4 + x / 2
