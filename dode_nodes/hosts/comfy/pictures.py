"""Figures as ComfyUI's IMAGE."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(figure: Callable[..., Figure], *args: Any) -> torch.Tensor:
    """A figure as ``[1, H, W, 3]`` in 0…1; where it cannot be drawn, words that say so.

    A picture is never worth losing minutes of work that it would show.
    """
    try:
        return _rendered(figure(*args))
    except Exception as error:  # whatever a broken or foreign matplotlib makes of it
        logging.warning("D-ODE: no picture: %s", error)
        page = Image.new("RGB", (640, 64), "white")
        ImageDraw.Draw(page).text((12, 24), str(error).encode("ascii", "replace").decode(), fill="black")
        return _as_tensor(np.asarray(page))


def _rendered(figure: Figure) -> torch.Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return _as_tensor(np.asarray(canvas.buffer_rgba())[..., :3])


def _as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255).unsqueeze(0)
