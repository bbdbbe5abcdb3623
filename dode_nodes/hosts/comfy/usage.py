"""A row in this ComfyUI: its plain solver, and warnings if cfg or size differ from those it was made with."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ...errors import DodeError
from ...sampling.solvers import resolve
from ...tables.choice import Part
from ...tables.describe import amount
from ...tables.provenance import Origin
from ...tables.row import LambdaRow

_SEEN = 0.02  # of denoise: what is rounded away beyond it is said


def stock_row(row: LambdaRow) -> LambdaRow:
    """The plain solver to compare a row with; the row's own where this ComfyUI lacks the one it began with."""
    try:
        resolve(row.plain.solver)
    except DodeError:
        return replace(row, origin=Origin(row.origin.kind)).plain
    return row.plain


def denoise_remarks(part: Part, denoise: float) -> list[str]:
    """What a denoise has become, where whole steps are not what was asked for."""
    run, of = part.steps, part.row.paid_steps
    if abs(run / of - denoise) <= _SEEN:
        return []
    what = amount(run, part.evaluations) if part.evaluations != run else str(run)
    return [f"this runs the last {what} of {of} steps, which is denoise {run / of:.2g}"]


def usage_remarks(row: LambdaRow, cfg: float | None, latent: torch.Tensor) -> list[str]:
    """What differs much from what the row was distilled with: guidance, or size of the latent."""
    remarks = []
    made_at, shape = row.settings.get("cfg"), row.settings.get("latent_shape")
    if cfg is not None and made_at is not None and not _near(cfg, made_at, 1.25):
        remarks.append(f"λ was distilled at cfg {made_at:g}, this is cfg {cfg:g}")
    if shape and not _near(math.prod(latent.shape[2:]), math.prod(shape[1:]), 2.0):
        remarks.append(
            f"λ was distilled at latent size {_size(shape[1:])}, this is {_size(latent.shape[2:])}"
        )
    return remarks


def _near(a: float, b: float, ratio: float) -> bool:
    return max(a, b) <= ratio * min(a, b)


def _size(spatial: list[int] | torch.Size) -> str:
    return "×".join(map(str, reversed(spatial)))
