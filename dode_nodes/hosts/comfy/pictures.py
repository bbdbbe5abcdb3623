"""Figures as ComfyUI's IMAGE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def to_image(figure: Figure) -> torch.Tensor:
    """A matplotlib figure as ``[1, H, W, 3]`` in 0…1."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].astype("float32") / 255).unsqueeze(0)
