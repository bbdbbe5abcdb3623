"""Choosing a row of a table by its steps, as the sampling nodes do."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...errors import DodeError
from ...solvers import resolve
from ...table import LambdaRow, LambdaTable, end_error
from .samplers import ANY


def rows_of(table: LambdaTable, solver: str) -> list[LambdaRow]:
    """The rows that the solver filter lets through.

    Raises:
        DodeError: none; names what the table has.
    """
    rows = [row for row in table.rows if solver == ANY or row.serves(solver)]
    if not rows:
        raise DodeError(f"this λ table has no row for the solver '{solver}'. It has: {table.contents()}")
    return rows


def row_for_steps(table: LambdaTable, steps: int, solver: str) -> LambdaRow:
    """The row of this many steps; of several, the one with the smallest held-out error, then the first.

    Raises:
        DodeError: none; names the steps, solvers and schedules that there are.
    """
    rows = [row for row in rows_of(table, solver) if row.steps == steps]
    if not rows:
        raise DodeError(f"this λ table has no row of {steps} steps. It has: {table.contents()}")
    return min(rows, key=end_error)


def sigmas_of(row: LambdaRow, denoise: float) -> torch.Tensor:
    """The last round(N · denoise) steps of the row's schedule, float32; nothing for 0.

    Raises:
        DodeError: the solver cannot be started there.
    """
    steps = round(row.steps * denoise)
    if steps == 0:
        return torch.FloatTensor([])
    if not row.evaluations[row.steps - steps]:
        starts = [n for n in range(1, row.steps + 1) if row.evaluations[row.steps - n]]
        raise DodeError(
            f"{row.solver} cannot take only the last {steps} of these {row.steps} steps; it can take {starts}"
        )
    return torch.tensor(row.sigmas[row.steps - steps :], dtype=torch.float32)


def stock_row(row: LambdaRow) -> LambdaRow:
    """The plain solver to compare a row with; the row's own where this ComfyUI lacks the one it began with."""
    try:
        resolve(row.plain.solver)
    except DodeError:
        return replace(row, report={}).plain
    return row.plain


def usage_remarks(row: LambdaRow, cfg: float | None, latent: torch.Tensor) -> list[str]:
    """What differs much from what the row was distilled with: guidance, or size of the latent."""
    remarks = []
    made_at = row.settings.get("cfg")
    if cfg is not None and isinstance(made_at, (int, float)) and not _near(cfg, made_at, 1.25):
        remarks.append(f"λ was distilled at cfg {made_at:g}, this is cfg {cfg:g}")
    shape = row.settings.get("latent_shape")
    if isinstance(shape, list):
        area, made_for = torch.Size(latent.shape[2:]).numel(), torch.Size(shape[1:]).numel()
        if not _near(area, made_for, 2.0):
            remarks.append(
                f"λ was distilled at latent size {_size(shape[1:])}, this is {_size(latent.shape[2:])}"
            )
    return remarks


def _near(a: float, b: float, ratio: float) -> bool:
    return max(a, b) <= ratio * min(a, b)


def _size(spatial: list[int] | torch.Size) -> str:
    return "×".join(map(str, reversed(spatial)))
