"""What makes two requests for a fit the same: what is asked for, by content, and what the pipeline answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from ...fit.key import key_of, refuse
from ...fit.latents import Latents
from ...fit.runs import Run
from ...sampling.solvers import resolve


def key_of_fit(
    pipe: diffusers.DiffusionPipeline,
    latents: Latents,
    sigmas: Sequence[float],
    parts: dict[str, Any],
) -> str:
    """See ``fit.key``. Hooks, LoRAs, ControlNets and attention processors cannot all be read: what the pipeline makes of
    one latent of each prompt, at these σ, tells them apart to the last digit.

    Raises:
        NoKey: something that is asked for cannot be compared; says what.
    """
    asked = key_of({"pipeline": type(pipe).__name__, "diffusers": diffusers.__version__, **parts}, _known)
    run = Run(resolve("euler"), torch.tensor([*sigmas, 0.0]))
    firsts = {batch.place: batch for batch in reversed(Latents(latents.groups, 1).batches())}
    with torch.no_grad():
        answers = [run(batch.group.model, batch) for batch in firsts.values()]
    return key_of({"asked": asked, "answers": answers})


def _known(value: Any) -> Any:
    """Pictures, for a ControlNet or the like."""
    if isinstance(value, (Image.Image, np.ndarray)):
        return torch.from_numpy(np.array(value))
    if isinstance(value, np.generic):
        return value.item()
    return refuse(value)
