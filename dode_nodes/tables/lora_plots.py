"""The figure of a LoRA's training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .describe import number
from .figures import COLOURS, DENSE, GREY, grouped_bars, log_axis, panel_grid, whole_numbers, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WINDOW = 20
"""Batches, whose mean loss is drawn."""


class Errors(NamedTuple):
    """RMS distances to the teacher's end on latents held out, of a number of evaluations; None where not known."""

    evaluations: int
    stock: float | None
    row: float
    with_lora: float | None


def lora_figure(errors: Sequence[Errors], losses: Sequence[float]) -> Figure:
    """What the LoRA does for each row, as bars, and the loss batch by batch with its running mean.

    Raises:
        DodeError: there is no matplotlib.
    """
    figure, (left, right) = panel_grid(1, 2)
    grouped_bars(
        left,
        [str(each.evaluations) for each in errors],
        [
            ("best stock sampler", [each.stock for each in errors], GREY),
            ("the row alone", [each.row for each in errors], COLOURS[0]),
            ("the row with the LoRA", [each.with_lora for each in errors], COLOURS[1]),
        ],
        number,
    )
    words(
        left,
        "How far from the slow sampler's pictures?",
        "distance, on noises that were held out",
        "evaluations",
    )
    numbers = np.arange(1, len(losses) + 1)
    right.plot(numbers, losses, color=GREY, linewidth=0.6, label="a batch")
    if len(losses) > _WINDOW:
        mean = np.convolve(losses, np.full(_WINDOW, 1 / _WINDOW), "valid")
        right.plot(numbers[_WINDOW - 1 :], mean, color=COLOURS[1], linewidth=1.8, label=f"mean of {_WINDOW}")
    if any(loss > 0 for loss in losses):
        log_axis(right, "y", DENSE)
    whole_numbers(right)
    words(right, "Loss", "batch", "distance to the teacher's end (L1)")
    return figure
