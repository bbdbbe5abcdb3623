"""Figures of λ and of errors; see ``figures`` for what they have in common."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import accumulate, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import DodeError
from ..sigmas import is_flow
from .describe import headlines, number, rows_told
from .figures import (
    COLOURS,
    DENSE,
    GREY,
    SPARSE,
    STOCK,
    as_stock,
    grouped_bars,
    log_axis,
    panel_grid,
    styles,
    whole_numbers,
    words,
)
from .row import LambdaRow
from .table import LambdaTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_MOST_HEADLINES = 6
_LETTERS_PER_INCH = 13


class Curve(NamedTuple):
    """One solver's errors at several budgets.

    ``evaluations`` and ``errors`` are of equal length; a ``stock`` solver's curve is grey and dashed.
    """

    label: str
    evaluations: Sequence[int]
    errors: Sequence[float]
    stock: bool


class Panel(NamedTuple):
    """Curves to compare with each other, under a title."""

    title: str
    curves: Sequence[Curve]


def lambda_figure(rows: Sequence[LambdaRow]) -> Figure:
    """λ against σ: a panel per solver and prediction, a curve per row, up to a limit; bars are standard errors.

    λ is how much further the newest output is taken than the solver takes it: for weights over the history
    W_kk − 1. The first evaluation's λ acts on nothing and is left out.

    Raises:
        DodeError: there is no row, or no matplotlib.
    """
    members = _by_solver(rows)
    across = len(members) if len(members) <= 3 else 2
    figure, axes = panel_grid(-(-len(members) // across), across)
    for ax in axes[len(members) :]:
        ax.remove()
    for ax, (title, group) in zip(axes, members, strict=False):
        _draw_lambdas(ax, title, group)
    return figure


def error_per_step_figure(row: LambdaRow) -> Figure:
    """The error on held-out latents after each step, without and with λ, and the teacher's own.

    Raises:
        DodeError: λ was not checked, so that there are no errors, or there is no matplotlib.
    """
    figure, (ax,) = panel_grid(1, 1)
    if not _draw_errors_per_step(ax, row.label, [row]):
        raise DodeError(f"{row.label}: its report has no errors per step: λ was not checked")
    return figure


def report_figure(table: LambdaTable) -> Figure:
    """A table, two panels for every solver and prediction; of a very long one, the first rows.

    Above them what the rows gain, in everyone's words and as bars, where latents of their own tell. Of greedy rows λ
    against σ, and the errors per step; of refined rows σ before and after (λ, where they kept their σ), and the error
    stage by stage.

    Raises:
        DodeError: there is no matplotlib.
    """
    members = _by_solver(table.rows)
    told = [row for row in rows_told(table) if row.unseen is not None and row.unseen.corresponds][:_MOST_ROWS]
    figure, axes = panel_grid(len(members), 2, above=1 + 0.5 * len(told) if told else 0)
    if told:
        _draw_gains(axes.pop(0), told)
    for (title, group), left, right in zip(members, axes[::2], axes[1::2], strict=True):
        refined = group[0].is_refined
        if refined and any(row.has_own_sigmas for row in group):
            _draw_schedules(left, title, group)
        else:
            _draw_lambdas(left, title, group)
        if not (_draw_stages if refined else _draw_errors_per_step)(right, title, group):
            right.remove()
    _head(figure, "\n".join(headlines(table)[:_MOST_HEADLINES]))
    return figure


def _head(figure: Figure, text: str) -> None:
    if text:
        across = int(figure.get_figwidth() * _LETTERS_PER_INCH)
        text = "\n".join(textwrap.fill(line, across, subsequent_indent="    ") for line in text.splitlines())
        figure.suptitle(text, fontsize=10, x=0.01, ha="left", parse_math=False)


def error_against_evaluations_figure(panels: Sequence[Panel], note: str = "") -> Figure:
    """Error against network evaluations; the panels share both axes.

    Args:
        panels: what to compare.
        note: words above all of them.

    Raises:
        DodeError: there is nothing to draw, or no matplotlib.
    """
    if not panels:
        raise DodeError("there is no curve to draw")
    across = len(panels) if len(panels) <= 3 else 2
    figure, axes = panel_grid(-(-len(panels) // across), across, share=True)
    for ax in axes[len(panels) :]:
        ax.remove()
    _head(figure, note)
    budgets = sorted({n for panel in panels for curve in panel.curves for n in curve.evaluations})
    for ax, (title, curves) in zip(axes, panels, strict=False):
        style = styles()
        for curve in curves:
            ax.plot(curve.evaluations, curve.errors, label=curve.label,
                    **(STOCK if curve.stock else next(style)))  # fmt: skip
        log_axis(ax, "y", DENSE)
        ax.set_xticks(budgets)
        words(ax, title, "network evaluations", "error (RMS)")
    return figure


_FIT = "Jacobian"
"""In the name of a stage that was fitted; the others are what a refinement may begin with."""
_EDGE = 1e100  # beyond it matplotlib's axes overflow
_MOST_PANELS, _MOST_ROWS, _MOST_STAGES = 16, 24, 32
"""What is drawn of a table, of a panel's rows and of a row's stages: a file may list any number."""


def _by_solver(rows: Sequence[LambdaRow]) -> list[tuple[str, list[LambdaRow]]]:
    """Rows to draw together, under a title."""
    if not rows:
        raise DodeError("there is no row to draw")
    members: dict[tuple[str, str, bool], list[LambdaRow]] = {}
    for row in rows:
        solver = row.plain.solver if row.is_refined else row.solver
        members.setdefault((solver, row.prediction, row.is_refined), []).append(row)
    return [
        (f"{solver}{', refined' if refined else ''} ({prediction})", group[:_MOST_ROWS])
        for (solver, prediction, refined), group in islice(members.items(), _MOST_PANELS)
    ]


def _draw_gains(ax: Axes, rows: Sequence[LambdaRow]) -> None:
    """For each number of evaluations how far stock and the row end from the slow sampler's pictures."""
    raced = any(row.best_stock for row in rows)
    unseen = [row.unseen for row in rows if row.unseen is not None]
    stock = [_within_axes(of.stock.rms) for of in unseen]
    dode = [_within_axes(of.dode.rms) for of in unseen]
    grouped_bars(
        ax,
        [str(row.nfe) for row in rows],
        [
            ("best stock sampler" if raced else "stock sampler", stock, GREY),
            ("D-ODE, at the same speed", dode, COLOURS[0]),
        ],
        number,
    )
    words(ax, "How far from the slow sampler's pictures? Shorter is better.",
          "distance, on noises that nothing was fitted to", "evaluations")  # fmt: skip


def _draw_lambdas(ax: Axes, title: str, rows: Sequence[LambdaRow]) -> None:
    ax.axhline(0, color=GREY, linestyle="--", linewidth=1)
    drawn = False
    for row, style in zip(rows, styles(), strict=False):
        if points := _lambdas(row):
            drawn = True
            sigmas, lambdas, scatter = zip(*points, strict=True)
            label = f"{row.nfe} evaluations{_shrunk(row)}"
            ax.errorbar(sigmas, lambdas, yerr=scatter, label=label, elinewidth=1, capsize=2.5, **style)
    if not drawn:
        ax.text(0.5, 0.6, "one evaluation: there is no λ to fit", ha="center", transform=ax.transAxes)
    if not is_flow(max((row.sigmas for row in rows), key=lambda sigmas: float(sigmas[0]))):
        log_axis(ax, "x", SPARSE)
    ax.invert_xaxis()  # as sampling goes
    words(ax, title, "σ (sampling goes to the right)", "λ (0: the stock solver)")


def _draw_errors_per_step(ax: Axes, title: str, rows: Sequence[LambdaRow]) -> bool:
    """Draw them for the rows that have them; whether there was one."""
    all_rows = [(_errors_after(row, "stock"), _errors_after(row, "dode"), row) for row in rows]
    drawn = [(stock, dode, row) for stock, dode, row in all_rows if stock and dode]
    for (stock, dode, row), style in zip(drawn, styles(), strict=False):
        ax.plot(*zip(*stock, strict=True), **as_stock(style["marker"]))
        ax.plot(*zip(*dode, strict=True), label=f"D-ODE, {row.nfe} evaluations", **style)
    if drawn:
        ax.plot([], [], label="stock solver", **as_stock(""))
        smallest = min(error for _, dode, _ in drawn for _, error in dode)
        _draw_teachers_own(ax, [row for *_, row in drawn], smallest)
        ax.set_xticks(range(1, max(row.steps for *_, row in drawn) + 1))
        log_axis(ax, "y", DENSE)
        words(ax, title, "after step", "distance to the teacher (RMS)")
    return bool(drawn)


def _draw_schedules(ax: Axes, title: str, rows: Sequence[LambdaRow]) -> None:
    """σ after each step, before and after refining; the last is 0 in all of them, and has no logarithm."""
    ax.plot([], [], label="before refining", **as_stock(""))
    for row, style in zip(rows, styles(), strict=False):
        before, after = row.plain.sigmas[:-1], row.sigmas[:-1]  # one more where the first step is free
        ax.plot(range(len(before)), before, **as_stock(style["marker"]))
        ax.plot(range(len(after)), after, label=f"{row.nfe} evaluations", **style)
    if not is_flow(rows[0].sigmas):
        log_axis(ax, "y", SPARSE)
    ax.set_xticks(range(max(row.steps for row in rows)))
    words(ax, title, "after step", "σ")


class _Drawn(NamedTuple):
    """A stage of a refinement that has a place on a logarithmic axis."""

    name: str
    held_out_error: float


def _draw_stages(ax: Axes, title: str, rows: Sequence[LambdaRow]) -> bool:
    """The held-out errors that each refinement began with, and of all that it tried; whether there was one to draw."""
    stages = [_stages(row) for row in rows]
    if not any(stages):
        return False
    for row, each, style in zip(rows, stages, styles(), strict=False):
        begun = [stage for stage in each if _FIT not in stage.name]
        tried = [stage for stage in each if _FIT in stage.name]
        numbered = [*((0, stage) for stage in begun), *enumerate(tried, 1)]
        kept = [pair for pair in numbered if pair[1].name == row.report["refined"].get("kept")]
        nearest = min((stage.held_out_error for stage in begun), default=None)
        errors = [*([] if nearest is None else [nearest]), *(stage.held_out_error for stage in tried)]
        points, hollow = style | {"linestyle": ""}, {"markerfacecolor": "white"}
        ax.plot(*_points(numbered), **points | hollow)
        ax.plot(
            range(nearest is None, len(tried) + 1), list(accumulate(errors, min)), **style | {"marker": ""}
        )
        ax.plot(*_points(kept), **points | {"markersize": 7.5})
        ax.plot([], [], label=f"{row.nfe} evaluations", **style)
    _draw_teachers_own(ax, rows, min(stage.held_out_error for each in stages for stage in each))
    log_axis(ax, "y", DENSE)
    whole_numbers(ax)
    words(
        ax, title, "0: starting points; then what was fitted (filled: kept)", "distance to the teacher (RMS)"
    )
    return True


def _points(numbered: Sequence[tuple[int, _Drawn]]) -> tuple[list[int], list[float]]:
    return [i for i, _ in numbered], [stage.held_out_error for _, stage in numbered]


def _stages(row: LambdaRow) -> list[_Drawn]:
    told = row.report.get("refined", {}).get("stages", [])
    return [
        _Drawn(stage["stage"], _within_axes(held))
        for stage in told[:_MOST_STAGES]
        if (held := stage.get("held_out_error")) is not None and held > 0
    ]


def _draw_teachers_own(ax: Axes, rows: Sequence[LambdaRow], smallest: float) -> None:
    """A line at the teacher's own error, if that is not far below the smallest error drawn.

    There it would flatten the curves, and say nothing about them.
    """
    own = next((row.report.get("teacher_error") for row in rows), None)
    if own is not None and own > smallest / 5:
        ax.axhline(
            _within_axes(own),
            color=GREY,
            linestyle=":",
            linewidth=1.2,
            label="the teacher's own error, about",
        )


def _errors_after(row: LambdaRow, name: str) -> list[tuple[int, float]]:
    """(step, held-out error); zeros have no logarithm."""
    errors = row.report.get("after_steps", {}).get(name, [])
    return [(i + 1, _within_axes(error)) for i, error in enumerate(errors) if error and error > 0]


def _within_axes(error: float) -> float:
    return min(max(error, 1 / _EDGE), _EDGE)


def _shrunk(row: LambdaRow) -> str:
    part = row.report.get("shrunk_to", 1)
    if part == 1:
        return ""
    return f", shrunk to {part:g} of the fit" if part else ", set to 0: it made things worse"


def _lambdas(row: LambdaRow) -> list[tuple[float, float, float]]:
    """(σ, λ, standard error) of every evaluation that λ acts on.

    Of weights over the history, λ is W_kk − 1: how much further the newest output is taken.
    """
    history = row.form == "history"
    lambdas = np.clip(np.diag(row.whole_weights) - 1 if history else row.weights, -_EDGE, _EDGE)
    scatter = row.report.get("lambda_standard_error", [])
    return [
        (sigma, float(lambdas[k]), min((scatter[k] if k < len(scatter) else None) or 0.0, _EDGE))
        for k, sigma in enumerate(_asked(row))
        if k > 0 or history
    ]


def _asked(row: LambdaRow) -> list[float]:
    """The σ of each evaluation; stages within a step, which a row does not know, evenly spaced over it."""
    starts = [(s, n) for s, n in zip(row.sigmas[:-1], row.evaluations, strict=True) if n]
    ends = [*(s for s, _ in starts[1:]), 0.0]
    return [
        float(start + (end - start) * stage / count)
        for (start, count), end in zip(starts, ends, strict=True)
        for stage in range(count)
    ]
