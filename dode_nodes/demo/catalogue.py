"""The embedded models by the names that the command line has for them."""

from __future__ import annotations

import torch

from .colour.models import load_colour_model
from .models import KINDS, DemoModel, load_demo_model

PICTURES = "pictures"
NAMES = (PICTURES, *KINDS)
"""The first is what people are shown; the digits are quicker."""


def load_model(name: str, device: torch.device | str = "cpu") -> DemoModel:
    """The embedded model of this name, float32.

    Raises:
        DodeError: unknown name, or the weights are missing or unusable.
    """
    if name == PICTURES:
        return load_colour_model("flow", device=device)
    return load_demo_model(name, device=device)
