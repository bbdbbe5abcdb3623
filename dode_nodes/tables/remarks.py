"""What people should know of a row when they run it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .choice import NEAR_CFG, NEAR_SIZE, Part, asked_steps, cfg_range, steps_text
from .provenance import PLAIN
from .row import LambdaRow
from .table import LambdaTable


def steps_remarks(part: Part, steps: int, table: LambdaTable) -> list[str]:
    """That another number of steps is run than was asked for."""
    if (run := asked_steps(part.row)) == steps:
        return []
    return [f"{run} steps are run, not {steps}: {steps_text(table.rows)}"]


def usage_remarks(
    row: LambdaRow, cfg: float | None, latent: torch.Tensor, pixels: int | None = None
) -> list[str]:
    """That no λ is used; what differs much from what the row was distilled with: guidance, or size.

    Args:
        pixels: along a side of a picture, for each number along a side of the latent; None where that is not known.
    """
    remarks = []
    if row.origin.kind == PLAIN:
        remarks.append(f"the stock sampler {row.solver} runs: here it is nearer to the teacher than λ")
    (low, high), shape = cfg_range(row), row.settings.get("latent_shape")
    if cfg is not None and low is not None and high is not None and not _within(cfg, low, high, NEAR_CFG):
        made_at = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        remarks.append(f"λ was distilled at cfg {made_at}, this is cfg {cfg:g}")
    if shape and not _near(math.prod(latent.shape[2:]), math.prod(shape[1:]), NEAR_SIZE):
        remarks.append(
            f"λ was distilled at {_size(shape[1:], pixels)}, this is {_size(latent.shape[2:], pixels)}"
        )
    return remarks


def _within(value: float, low: float, high: float, ratio: float) -> bool:
    return low <= ratio * value and value <= ratio * high


def _near(a: float, b: float, ratio: float) -> bool:
    return max(a, b) <= ratio * min(a, b)


def _size(spatial: Sequence[int], pixels: int | None) -> str:
    """Width first; a video's frames last, as a latent has them."""
    if pixels is None or len(spatial) < 2:
        return "latent size " + "×".join(map(str, reversed(spatial)))
    *frames, high, wide = spatial
    of_frames = "".join(f", {count} latent frames" for count in frames)
    return f"{wide * pixels}×{high * pixels}{of_frames}"
