"""Figures of λ, of errors, and of pictures side by side.

Every function returns a matplotlib ``Figure`` of its own, without pyplot: nothing is shared, nothing needs a
display, and ``figure.savefig(path)`` writes it. Stock solvers are grey and dashed, D-ODE solvers coloured.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import DodeError
from .reading import GIVEN, IPNDM, PLAIN, Stage, refinement_of
from .table import LambdaRow, LambdaTable
from .teacher import is_flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette (2008): told apart by colour-blind readers, too."""
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#767676"
DPI = 150


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


class Block(NamedTuple):
    """Columns of pictures under a common title, with a heading each."""

    title: str
    columns: Sequence[str]


class PictureRow(NamedTuple):
    """Pictures that were made in one way.

    Attributes:
        label: words at the left, in one line or several.
        images: ``[N, H, W]`` (grey) or ``[N, H, W, 3]``, 0 to 1.
        stock: whether the label is grey; else it is coloured.
        heads_group: whether a gap sets this row off from the one above.
    """

    label: str
    images: np.ndarray
    stock: bool = False
    heads_group: bool = False


def lambda_figure(rows: Sequence[LambdaRow]) -> Figure:
    """λ against σ: a panel per solver and prediction, a curve per row; bars are standard errors.

    λ is how much further the newest output is taken than the solver takes it: for weights over the history
    W_kk − 1, for weights per channel their mean. The first evaluation's λ acts on nothing and is left out.

    Raises:
        DodeError: there is no row, or no matplotlib.
    """
    members = _by_solver(rows)
    across = len(members) if len(members) <= 3 else 2
    figure, axes = _panels(-(-len(members) // across), across)
    for ax in axes[len(members) :]:
        ax.remove()
    for ax, (title, group) in zip(axes, members.items(), strict=False):
        _draw_lambdas(ax, title, group)
    return figure


def error_per_step_figure(row: LambdaRow) -> Figure:
    """The error on held-out latents after each step, without and with λ, and the teacher's own.

    Raises:
        DodeError: λ was not checked, so that there are no errors, or there is no matplotlib.
    """
    figure, (ax,) = _panels(1, 1)
    if not _draw_errors_per_step(ax, row.label, [row]):
        raise DodeError(f"{row.label}: its report has no errors per step: λ was not checked")
    return figure


def report_figure(table: LambdaTable) -> Figure:
    """All of a table, two panels for every solver and prediction.

    Of greedy rows λ against σ, and the errors per step; of refined rows σ before and after (λ, where they
    kept their σ), and the error stage by stage.

    Raises:
        DodeError: there is no matplotlib.
    """
    members = _by_solver(table.rows)
    figure, axes = _panels(len(members), 2)
    for (title, group), left, right in zip(members.items(), axes[::2], axes[1::2], strict=True):
        refined = group[0].is_refined
        if refined and any(row.has_own_sigmas for row in group):
            _draw_schedules(left, title, group)
        else:
            _draw_lambdas(left, title, group)
        if not (_draw_stages if refined else _draw_errors_per_step)(right, title, group):
            right.remove()
    return figure


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
    figure, axes = _panels(-(-len(panels) // across), across, share=True)
    for ax in axes[len(panels) :]:
        ax.remove()
    if note:
        figure.suptitle(note, fontsize=10, x=0.01, ha="left")
    budgets = sorted({n for panel in panels for curve in panel.curves for n in curve.evaluations})
    for ax, (title, curves) in zip(axes, panels, strict=False):
        styles = _styles()
        for curve in curves:
            ax.plot(curve.evaluations, curve.errors, label=curve.label,
                    **(_STOCK if curve.stock else next(styles)))  # fmt: skip
        _log_axis(ax, "y", _DENSE)
        ax.set_xticks(budgets)
        _words(ax, title, "network evaluations", "error (RMS)")
    return figure


def picture_grid(rows: Sequence[PictureRow], blocks: Sequence[Block]) -> Figure:
    """Pictures in rows and columns, with words beside each row and above each column.

    Small pictures are enlarged smoothly; large ones are reduced so that a row stays below 2700 pixels.

    Args:
        rows: from top to bottom, all of as many pictures as the blocks have columns, all of one size.
        blocks: the columns, set off from each other.

    Raises:
        DodeError: there is no picture, the rows do not fit the columns, or there is no matplotlib.
    """
    count = sum(len(block.columns) for block in blocks)
    if not rows or not count:
        raise DodeError("there is no picture to draw")
    if any(len(row.images) != count for row in rows):
        raise DodeError(f"every row must have {count} pictures, one per column")
    grid = _Grid.of(rows, blocks)
    figure = _figure(grid.width, grid.height)
    lefts = iter(grid.lefts)
    for block in blocks:
        for j, heading in enumerate(block.columns):
            left = next(lefts)
            if j == 0:
                grid.text(figure, left, 0.3, block.title, fontsize=14, fontweight="bold")
            grid.text(figure, left + grid.cell / 2, grid.tops[0] - 0.13, heading, fontsize=13, ha="center")
    for row, top in zip(rows, grid.tops, strict=True):
        grid.text(figure, grid.lefts[0] - 0.12, top + grid.cell_height / 2, row.label, fontsize=11, ha="right",
                  linespacing=1.35, color=GREY if row.stock else COLOURS[0])  # fmt: skip
        for image, left in zip(row.images, grid.lefts, strict=True):
            grid.picture(figure, left, top, image)
    return figure


def comparison_figure(
    labels: Sequence[str], pictures: Sequence[np.ndarray | None], errors: Sequence[float]
) -> Figure:
    """Stock solver, D-ODE solver and teacher: their pictures, or the errors as bars where there are none.

    Args:
        labels: words for each of the three.
        pictures: of each, ``[N, H, W, 3]``, 0 to 1, the same N noises in each; or None.
        errors: of the first two, their distance to the third.

    Raises:
        DodeError: there is no matplotlib.
    """
    if any(images is None for images in pictures):
        figure, (ax,) = _panels(1, 1)
        ax.barh(labels[: len(errors)], errors, color=(GREY, COLOURS[0]), height=0.5)
        ax.invert_yaxis()
        _words(ax, "", "distance to the teacher (RMS)", "")
        return figure
    rows = [
        PictureRow(textwrap.fill(label, 34), np.asarray(images), stock=i != 1)
        for i, (label, images) in enumerate(zip(labels, pictures, strict=True))
    ]
    return picture_grid(rows, [Block("", [str(i + 1) for i in range(len(rows[0].images))])])


class _Grid(NamedTuple):
    """Where pictures lie, in inches from the upper left corner."""

    cell: float
    cell_height: float
    lefts: Sequence[float]
    tops: Sequence[float]

    @classmethod
    def of(cls, rows: Sequence[PictureRow], blocks: Sequence[Block]) -> _Grid:
        height, width = rows[0].images.shape[1:3]
        starts = [i > 0 and j == 0 for i, block in enumerate(blocks) for j in range(len(block.columns))]
        cell = min(max(width / DPI, 0.72), 14 / len(starts))
        cell_height = cell * height / width
        heads = [row.heads_group and i > 0 for i, row in enumerate(rows)]
        top = 0.85 if any(block.title for block in blocks) else 0.4
        return cls(cell, cell_height, _places(2.9, cell, starts), _places(top, cell_height, heads))

    @property
    def width(self) -> float:
        return self.lefts[-1] + self.cell + 0.15

    @property
    def height(self) -> float:
        return self.tops[-1] + self.cell_height + 0.15

    def text(self, figure: Figure, x: float, y: float, words: str, **style: Any) -> None:
        figure.text(x / self.width, 1 - y / self.height, words, va="center", **style)

    def picture(self, figure: Figure, left: float, top: float, image: np.ndarray) -> None:
        margin = 0.02
        ax = figure.add_axes(
            (
                (left + margin) / self.width,
                1 - (top + self.cell_height - margin) / self.height,
                (self.cell - 2 * margin) / self.width,
                (self.cell_height - 2 * margin) / self.height,
            )
        )
        enlarged = image.shape[1] < self.cell * DPI
        ax.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1, aspect="auto",
                  interpolation="bicubic" if enlarged else "antialiased")  # fmt: skip
        ax.set_axis_off()


def _places(first: float, size: float, gaps: Sequence[bool]) -> list[float]:
    """Where things of one size begin, side by side, with a gap before some."""
    return [first + i * size + 0.25 * sum(gaps[: i + 1]) for i in range(len(gaps))]


_STOCK: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 1.6, "marker": "x", "markersize": 6}


def _as_stock(marker: str) -> dict[str, Any]:
    """Grey; the marker is that of the curve it belongs to, "" for all of them."""
    return _STOCK | {"marker": marker, "markersize": 4.5}


def _styles() -> cycle:
    """Colours and markers, in turn, for D-ODE solvers."""
    return cycle(
        [
            {"color": colour, "linewidth": 1.8, "marker": marker, "markersize": 5.5}
            for colour, marker in zip(COLOURS, MARKERS, strict=True)
        ]
    )


_BEGINNINGS = {PLAIN: "stock", GIVEN: "λ", IPNDM: "iPNDM-3"}
"""What refinements begin with, in the order that they are drawn."""
_MOST_STAGES = 24  # of a row: a file may list any number


def matplotlib_figure() -> type[Figure]:
    """matplotlib's class of figures.

    Raises:
        DodeError: there is no matplotlib; the message says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DodeError("pictures need matplotlib: pip install 'dode-nodes[demo]'") from error
    return Figure


def _figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    return matplotlib_figure()(figsize=(width, height), dpi=DPI, facecolor="white")


def _panels(down: int, across: int, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    figure = _figure(max(4.6 * across, 6), 3.6 * down + 0.3)
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    axes = list(figure.subplots(down, across, squeeze=False, sharex=share, sharey=share).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(labelbottom=True, labelleft=True)
    return figure, axes


def _words(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=11, fontweight="bold", loc="left")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(
            fontsize=9, facecolor="white", framealpha=0.8, edgecolor="none", handlelength=1.5, borderpad=0.2
        )


_SPARSE, _DENSE = (1, 2, 5), (1, 1.5, 2, 3, 5, 7)
"""Ticks in a decade of a logarithmic axis: for σ, and for errors, which rarely span more than one."""


def _log_axis(ax: Axes, which: str, ticks: Sequence[float]) -> None:
    """Logarithmic, with plain numbers between the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _by_solver(rows: Sequence[LambdaRow]) -> dict[str, list[LambdaRow]]:
    if not rows:
        raise DodeError("there is no row to draw")
    members: dict[str, list[LambdaRow]] = {}
    for row in rows:
        title = f"{row.plain.solver}, refined" if row.is_refined else row.solver
        members.setdefault(f"{title} ({row.prediction})", []).append(row)
    return members


def _draw_lambdas(ax: Axes, title: str, rows: Sequence[LambdaRow]) -> None:
    ax.axhline(0, color=GREY, linestyle="--", linewidth=1)
    for row, style in zip(rows, _styles(), strict=False):
        if points := _lambdas(row):
            sigmas, lambdas, scatter = zip(*points, strict=True)
            label = f"{row.nfe} evaluations{_shrunk(row)}"
            ax.errorbar(sigmas, lambdas, yerr=scatter, label=label, elinewidth=1, capsize=2.5, **style)
    if not is_flow(max((row.sigmas for row in rows), key=lambda sigmas: sigmas[0])):
        _log_axis(ax, "x", _SPARSE)
    ax.invert_xaxis()  # as sampling goes
    _words(ax, title, "σ (sampling goes to the right)", "λ (0: the stock solver)")


def _draw_errors_per_step(ax: Axes, title: str, rows: Sequence[LambdaRow]) -> bool:
    """Draw them for the rows that have them; whether there was one."""
    drawn = [(_errors_after(row, "stock"), _errors_after(row, "dode"), row) for row in rows]
    drawn = [(stock, dode, row) for stock, dode, row in drawn if stock and dode]
    for (stock, dode, row), style in zip(drawn, _styles(), strict=False):
        ax.plot(*zip(*stock, strict=True), **_as_stock(style["marker"]))
        ax.plot(*zip(*dode, strict=True), label=f"D-ODE, {row.nfe} evaluations", **style)
    if drawn:
        ax.plot([], [], label="stock solver", **_as_stock(""))
        smallest = min(error for _, dode, _ in drawn for _, error in dode)
        _draw_teachers_own(ax, [row for *_, row in drawn], smallest)
        ax.set_xticks(range(1, max(row.steps for *_, row in drawn) + 1))
        _log_axis(ax, "y", _DENSE)
        _words(ax, title, "after step", "distance to the teacher (RMS)")
    return bool(drawn)


def _draw_schedules(ax: Axes, title: str, rows: Sequence[LambdaRow]) -> None:
    """σ after each step, before and after refining; the last is 0 in all of them, and has no logarithm."""
    ax.plot([], [], label="before refining", **_as_stock(""))
    for row, style in zip(rows, _styles(), strict=False):
        steps = range(row.steps)
        ax.plot(steps, row.plain.sigmas[:-1], **_as_stock(style["marker"]))
        ax.plot(steps, row.sigmas[:-1], label=f"{row.nfe} evaluations", **style)
    if not is_flow(rows[0].sigmas):
        _log_axis(ax, "y", _SPARSE)
    ax.set_xticks(range(max(row.steps for row in rows)))
    _words(ax, title, "after step", "σ")


def _draw_stages(ax: Axes, title: str, rows: Sequence[LambdaRow]) -> bool:
    """The held-out errors that each refinement began with and came to; whether there was one to draw."""
    refinements = [refinement_of(row.report) for row in rows]
    stages = [[s for s in told.stages[:_MOST_STAGES] if (s.held_out_error or 0) > 0] for told in refinements]
    names = dict.fromkeys(stage.name for each in stages for stage in each)
    names = [
        *(name for name in _BEGINNINGS if name in names),
        *(name for name in names if name not in _BEGINNINGS),
    ]
    if not names:
        return False
    for row, told, each, style in zip(rows, refinements, stages, _styles(), strict=False):
        begun = [stage for stage in each if stage.name in _BEGINNINGS]
        refined = [stage for stage in each if stage.name not in _BEGINNINGS]
        path = sorted(begun, key=_fitted_error)[:1] + refined  # the nearest on the fitted latents went on
        kept = [stage for stage in each if stage.name == told.kept]
        points, hollow = style | {"linestyle": ""}, {"markerfacecolor": "white"}
        for members, how in (
            (begun, points | hollow),
            (path, style | hollow | {"label": f"{row.nfe} evaluations"}),
            (kept, points | {"markersize": 7.5}),
        ):
            places = [names.index(stage.name) for stage in members]
            ax.plot(places, [stage.held_out_error for stage in members], **how)
    _draw_teachers_own(ax, rows, min(stage.held_out_error for each in stages for stage in each))
    _log_axis(ax, "y", _DENSE)
    ticks = [_BEGINNINGS.get(name, name.removeprefix("Jacobian ")[:10]) for name in names]
    ax.set_xticks(range(len(ticks)), ticks, parse_math=False)
    _words(ax, title, "begun with, then Jacobian 1, 2, … (filled: kept)", "distance to the teacher (RMS)")
    return True


def _fitted_error(stage: Stage) -> float:
    return np.inf if stage.fitted_error is None else stage.fitted_error


def _draw_teachers_own(ax: Axes, rows: Sequence[LambdaRow], smallest: float) -> None:
    """A line at the teacher's own error, if that is not far below the smallest error drawn.

    There it would flatten the curves, and say nothing about them.
    """
    own = next((row.report.get("teacher_error") for row in rows), None)
    if isinstance(own, float) and own > smallest / 5:
        ax.axhline(own, color=GREY, linestyle=":", linewidth=1.2, label="the teacher's own, about")


def _errors_after(row: LambdaRow, name: str) -> list[tuple[int, float]]:
    """(step, held-out error) of a row's report, which is anybody's words; zeros have no logarithm."""
    errors = row.report.get("error")
    steps = errors.get(name) if isinstance(errors, dict) else None
    return [
        (i + 1, error)
        for i, error in enumerate(steps if isinstance(steps, list) else [])
        if isinstance(error, float) and error > 0
    ]


def _shrunk(row: LambdaRow) -> str:
    part = row.report.get("shrunk_to")
    if not isinstance(part, (int, float)) or part == 1:
        return ""
    return f", shrunk to {part:g} of the fit" if part else ", set to 0: it did harm"


def _lambdas(row: LambdaRow) -> list[tuple[float, float, float]]:
    """(σ, λ, standard error) of every evaluation that λ acts on; no error of a λ that is not as fitted."""
    scatter = None if _shrunk(row) else row.report.get("lambda_standard_error")
    points = []
    first = 1 if row.form == "lambda" else 0
    for k, sigma in enumerate(_asked(row)):
        if k >= first:
            error = scatter[k] if isinstance(scatter, list) and k < len(scatter) else None
            lam = float(np.mean(row.corrections[k, k]))
            points.append((sigma, lam, error if isinstance(error, float) else 0.0))
    return points


def _asked(row: LambdaRow) -> list[float]:
    """The σ of each evaluation; stages within a step, which a row does not know, evenly spaced over it."""
    starts = [(s, n) for s, n in zip(row.sigmas[:-1], row.evaluations, strict=True) if n]
    ends = [*(s for s, _ in starts[1:]), 0.0]
    return [
        float(start + (end - start) * stage / count)
        for (start, count), end in zip(starts, ends, strict=True)
        for stage in range(count)
    ]
