"""What all figures share: colours, panels, axes, and matplotlib itself, which is imported when one is drawn.

Figures are matplotlib's ``Figure`` without pyplot: nothing is shared, nothing needs a display, and
``figure.savefig(path)`` writes them. Stock solvers are grey and dashed, D-ODE solvers coloured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from ..errors import DodeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette (2008): told apart by colour-blind readers, too."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One more than colours: a colour that comes again has another."""
_MOST_NAMES_INSIDE = 3
_SHORT_NAME = 14  # letters: three columns of them are no wider than a panel
GREY = "#767676"
DPI = 150

STOCK: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 1.6, "marker": "x", "markersize": 6}


def as_stock(marker: str) -> dict[str, Any]:
    """Grey; the marker is that of the curve it belongs to, "" for all of them."""
    return STOCK | {"marker": marker, "markersize": 4.5}


def styles() -> Iterator[dict[str, Any]]:
    """Colours and markers, in turn, for D-ODE solvers."""
    for colour, marker in zip(cycle(COLOURS), cycle(MARKERS), strict=False):
        yield {"color": colour, "linewidth": 1.8, "marker": marker, "markersize": 5.5}


def matplotlib_figure() -> type[Figure]:
    """matplotlib's class of figures.

    Raises:
        DodeError: there is no matplotlib; the message says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DodeError("pictures need matplotlib: run pip install matplotlib, with this Python") from error
    return Figure


def empty_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    return matplotlib_figure()(figsize=(width, height), dpi=DPI, facecolor="white")


def panel_grid(down: int, across: int, *, share: bool = False, above: float = 0) -> tuple[Figure, list[Axes]]:
    """Panels line by line; with a height in inches ``above``, one as wide as all of them comes first."""
    height = 3.6
    figure = empty_figure(max(4.6 * across, 6), height * down + above + 0.3)
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    heights = [above] * bool(above) + [height] * down
    grid = figure.add_gridspec(len(heights), across, height_ratios=heights)
    axes = [figure.add_subplot(grid[0, :])] if above else []
    for line in range(bool(above), len(heights)):
        for column in range(across):
            shared = axes[0] if share and axes else None
            axes.append(figure.add_subplot(grid[line, column], sharex=shared, sharey=shared))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(labelbottom=True, labelleft=True)
    return figure, axes


def words(ax: Axes, title: str, x: str, y: str) -> None:
    """A panel's words; many names of curves stand below it, for inside they would hide the curves."""
    ax.set_title(title, fontsize=11, fontweight="bold", loc="left", parse_math=False)
    ax.set_xlabel(x, parse_math=False)
    ax.set_ylabel(y, parse_math=False)
    if names := ax.get_legend_handles_labels()[1]:
        columns = 3 if max(map(len, names)) <= _SHORT_NAME else 2
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.19), "ncols": columns, "columnspacing": 1}
        legend = ax.legend(
            fontsize=9, facecolor="white", framealpha=0.8, edgecolor="none", handlelength=1.5, borderpad=0.2,
            **(below if len(names) > _MOST_NAMES_INSIDE else {}),
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)


def grouped_bars(
    ax: Axes,
    names: Sequence[str],
    series: Sequence[tuple[str, Sequence[float | None], str]],
    written: Callable[[float | None], str],
) -> None:
    """For each name a group of bars from the left, the first on top, with their numbers; nothing where there is none.

    Args:
        series: the bars' meaning, their lengths, one for each name, and their colour.
        written: a length in words.
    """
    height = 0.8 / len(series)
    for i, (label, lengths, colour) in enumerate(series):
        places = [at + (i - (len(series) - 1) / 2) * height for at in range(len(names))]
        bars = ax.barh(
            places, [length or 0.0 for length in lengths], 0.95 * height, color=colour, label=label
        )
        ax.bar_label(bars, list(map(written, lengths)), padding=3, fontsize=9)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.margins(x=0.1)


def whole_numbers(ax: Axes) -> None:
    """Ticks along x that count something."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


SPARSE, DENSE = (1, 2, 5), (1, 1.5, 2, 3, 5, 7)
"""Ticks in a decade of a logarithmic axis: for σ, and for errors, which rarely span more than one."""


def log_axis(ax: Axes, which: str, ticks: Sequence[float]) -> None:
    """Logarithmic, with plain numbers between the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
