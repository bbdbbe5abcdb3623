"""Which row of a table runs in a pass of the host: over all of its steps, or over the last of them."""

from __future__ import annotations

import math
from dataclasses import replace

from ...errors import DodeError
from ...sampling.sample import check_solver
from ...sampling.solvers import SOLVERS, resolve
from ...tables.choice import Part, part_for_steps
from ...tables.row import LambdaRow
from ...tables.table import LambdaTable

_NEAR_START = 1.6
"""A part of a row may begin at so many times the σ that the stock schedule would begin with, or so many times less: it
is about a step of eight. Another schedule type, at the same denoising strength, may be further away."""


def for_steps(table: LambdaTable, steps: int, cfg: float | None) -> Part:
    """The row with the nearest number of steps; of two, the one with more.

    Raises:
        DodeError: the table's samplers are not here.
    """
    return _checked(part_for_steps(_usable(table), steps, cfg=cfg, nearest=True))


def for_last_steps(table: LambdaTable, steps: int, run: int, sigma: float, cfg: float | None) -> Part:
    """The last ``run`` of ``steps`` steps: of a row with as many, else of one whose σ fits.

    Args:
        sigma: where the stock schedule would begin.

    Raises:
        DodeError: no row does; says what would.
    """
    table = _usable(table)
    counts = sorted({row.paid_steps for row in table.rows if row.paid_steps >= run})
    parts = [part for n in counts if (part := _last(table, n, run, cfg)) is not None]
    exact = [part for part in parts if part.row.paid_steps == steps]
    near = [part for part in parts if _distance(part, sigma) <= math.log(_NEAR_START)]
    if not exact and not near:
        raise DodeError(
            f"the λ table {table.called} has no row for the last {run} of {steps} steps, which begin at "
            f"σ = {sigma:.3g}: distil {steps} steps, too"
        )
    return _checked(exact[0] if exact else min(near, key=lambda part: _distance(part, sigma)))


def _usable(table: LambdaTable) -> LambdaTable:
    """The rows that can run here. Their steps are those that run, whatever they are called elsewhere."""
    here = [row for row in table.rows if row.solver in SOLVERS]
    if not here:
        raise DodeError(f"the λ table {table.called} is for samplers that are not here: {table.contents()}")
    reasons = [_why_not(row) for row in here]
    rows = [_as_run(row) for row, why in zip(here, reasons, strict=True) if not why]
    if not rows:
        raise DodeError(f"the λ table {table.called} cannot be used: {reasons[0]}")
    return replace(table, rows=rows)


def _why_not(row: LambdaRow) -> str:
    """Why a row cannot run; empty where it can."""
    try:
        check_solver(row, resolve(row.solver))
    except DodeError as error:
        return str(error)
    return ""


def _checked(part: Part) -> Part:
    """A part that can run: a row's plain solver may be one that is not here."""
    if why := _why_not(part.row):
        raise DodeError(why)
    return part


def _as_run(row: LambdaRow) -> LambdaRow:
    return replace(row, settings={name: value for name, value in row.settings.items() if name != "steps"})


def _last(table: LambdaTable, steps: int, run: int, cfg: float | None) -> Part | None:
    try:
        return part_for_steps(table, steps, run / steps, cfg=cfg)
    except DodeError:  # its solver cannot begin there
        return None


def _distance(part: Part, sigma: float) -> float:
    return abs(math.log(float(part.sigmas[0]) / sigma))
