"""What the first evaluations tell of all of them."""

from __future__ import annotations

import psutil
import torch
from comfy.model_patcher import ModelPatcher

from ...fit.progress import Progress, Reporter, in_words


def say_pace(reporter: Reporter, tried: Progress, left: int, model: ModelPatcher) -> None:
    """How long it will take at most, and how much memory it has taken so far.

    Args:
        tried: the first evaluations.
        left: how many there may still be.
        model: whose device counts.
    """
    if tried.pace is not None:
        reporter.say(
            f"at most about {in_words(tried.pace * left)} on this machine, with {_memory(model)} of memory so far"
        )


def _memory(model: ModelPatcher) -> str:
    """The most that was taken of the device's; where it has none of its own, what the process has."""
    own = model.load_device.type == "cuda"
    most = torch.cuda.max_memory_allocated(model.load_device) if own else psutil.Process().memory_info().rss
    return f"{most / 2**30:.1f} GiB"
