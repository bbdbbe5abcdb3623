"""A row in this ComfyUI: its plain solver, and what people should know when they run it."""

from __future__ import annotations

from dataclasses import replace

from ...errors import DodeError
from ...sampling.solvers import resolve
from ...tables.choice import Part
from ...tables.describe import amount
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
