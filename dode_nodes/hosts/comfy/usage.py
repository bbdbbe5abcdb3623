"""A row in this ComfyUI: its plain solver, and what people should know when they run it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ...errors import DodeError
from ...sampling.solvers import resolve
from ...tables.choice import NEAR_CFG, NEAR_SIZE, Part, cfg_range
from ...tables.describe import amount
from ...tables.provenance import PLAIN
from ...tables.row import LambdaRow
from ...tables.table import LambdaTable

_SEEN = 0.02  # of denoise: what is rounded away beyond it is said


def stock_row(row: LambdaRow) -> LambdaRow:
    """The plain solver to compare a row with; the row's own where this ComfyUI lacks the one it began with."""
    plain = row.plain
    if _is_here(plain.solver):
        return plain
    return replace(plain, solver=row.solver, solver_options=row.solver_options)


def check_solver_is_here(row: LambdaRow, table: LambdaTable) -> None:
    """Refuse a row whose sampler this ComfyUI lacks.

    Raises:
        DodeError: it does; names the sampler, and what the table has for samplers that are here.
    """
    if _is_here(row.solver):
        return
    runs_here = [
        f"{each.solver} ({amount(each.paid_steps, each.nfe)})" for each in table.rows if _is_here(each.solver)
    ]
    if row.is_callable:
        lack = f"the function {row.solver} of the person who made it, which no ComfyUI has: it runs in Python only"
    else:
        lack = f"the sampler '{row.solver}', which this ComfyUI does not have: install the node pack that brings it"
    also = f"or choose another solver. This table also has rows for {', '.join(dict.fromkeys(runs_here))}"
    raise DodeError(f"this row needs {lack}" + (f", {also}" if runs_here else ""))


def _is_here(solver: str) -> bool:
    try:
        resolve(solver)
    except DodeError:
        return False
    return True


def denoise_remarks(part: Part, denoise: float) -> list[str]:
    """What a denoise has become, where whole steps are not what was asked for."""
    run, of = part.steps, part.row.paid_steps
    if abs(run / of - denoise) <= _SEEN:
        return []
    what = amount(run, part.evaluations) if part.evaluations != run else str(run)
    return [f"this runs the last {what} of {of} steps, which is denoise {run / of:.2g}"]


def usage_remarks(row: LambdaRow, cfg: float | None, latent: torch.Tensor) -> list[str]:
    """That no λ is used; what differs much from what the row was distilled with: guidance, or size of the latent."""
    remarks = []
    if row.origin.kind == PLAIN:
        remarks.append(f"the stock sampler {row.solver} runs: here it is nearer to the teacher than λ")
    (low, high), shape = cfg_range(row), row.settings.get("latent_shape")
    if cfg is not None and low is not None and high is not None and not _within(cfg, low, high, NEAR_CFG):
        made_at = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        remarks.append(f"λ was distilled at cfg {made_at}, this is cfg {cfg:g}")
    if shape and not _near(math.prod(latent.shape[2:]), math.prod(shape[1:]), NEAR_SIZE):
        remarks.append(
            f"λ was distilled at latent size {_size(shape[1:])}, this is {_size(latent.shape[2:])}"
        )
    return remarks


def _within(value: float, low: float, high: float, ratio: float) -> bool:
    return low <= ratio * value and value <= ratio * high


def _near(a: float, b: float, ratio: float) -> bool:
    return max(a, b) <= ratio * min(a, b)


def _size(spatial: list[int] | torch.Size) -> str:
    return "×".join(map(str, reversed(spatial)))
