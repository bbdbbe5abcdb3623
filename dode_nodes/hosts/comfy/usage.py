"""A row in this ComfyUI: its plain solver, and what people should know when they run it."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ...errors import DodeError
from ...fit.race import MakeSigmas
from ...sampling.solvers import resolve
from ...sigmas import same_sigma
from ...tables.choice import Part
from ...tables.describe import amount, setting_text
from ...tables.provenance import StockSetting
from ...tables.row import LambdaRow
from ...tables.table import LambdaTable

_SEEN = 0.02  # of denoise: what is rounded away beyond it is said


def stock_row(row: LambdaRow) -> LambdaRow:
    """The plain solver to compare a row with; the row's own where this ComfyUI lacks the one it began with."""
    plain = row.plain
    if _is_here(plain.solver):
        return plain
    return replace(plain, solver=row.solver, solver_options=row.solver_options)


class Opponent(NamedTuple):
    """The stock sampler that a row is measured against, as a row, and its name; the setting, if it is a race's."""

    row: LambdaRow
    name: str
    setting: StockSetting | None = None


def opponent_of(row: LambdaRow, make_sigmas: MakeSigmas) -> Opponent:
    """The best stock setting that was found when the row was made.

    The plain solver that the row began with where none was looked for, where this ComfyUI lacks it, and where its
    schedule begins elsewhere.
    """
    if (setting := row.best_stock) is not None and (best := _as_row(setting, row, make_sigmas)) is not None:
        return Opponent(best, f"best stock: {setting_text(setting)}", setting)
    plain = stock_row(row)
    return Opponent(plain, plain.solver)


def _as_row(setting: StockSetting, like: LambdaRow, make_sigmas: MakeSigmas) -> LambdaRow | None:
    """A setting with the evaluations and the first σ of another row; None where this ComfyUI has no such."""
    try:
        solver, options = setting.solver_and_options()
        resolve(solver)
        sigmas = make_sigmas(setting.scheduler, like.nfe, setting.discard_penultimate).double().cpu().numpy()
    except DodeError:
        return None
    steps = len(sigmas) - 1
    if steps != like.nfe or not same_sigma(float(sigmas[0]), float(like.plain.sigmas[0])):
        return None
    return LambdaRow(solver, sigmas, (1,) * steps, np.zeros(steps), solver_options=options)


def opponent_text(opponent: Opponent) -> str:
    """Who it is, over which σ."""
    return f"{opponent.name}, σ {', '.join(f'{sigma:.4g}' for sigma in opponent.row.sigmas)}"


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
