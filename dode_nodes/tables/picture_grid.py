"""Pictures side by side, with words beside each row and above each column."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import DodeError
from .figures import COLOURS, DPI, GREY, empty_figure, panel_grid, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MAGNIFIED = 4
"""Differences of pictures, or they would look black."""
_MOST_SHOWN = 8
"""Of the noises that were compared: more would be stamps."""
_LINE = 34
"""Characters of a label."""
_LINE_HEIGHT = 0.18
"""Of a heading, in inches."""


class Block(NamedTuple):
    """Columns of pictures under a common title, with a heading each, whose words are written one below the other."""

    title: str
    columns: Sequence[str]


class PictureRow(NamedTuple):
    """Pictures that were made in one way.

    Attributes:
        label: words at the left, in one line or several; longer ones are wrapped.
        images: ``[N, H, W]`` (grey) or ``[N, H, W, 3]``, 0 to 1.
        stock: whether the label is grey; else it is coloured.
        heads_group: whether a gap sets this row off from the one above.
    """

    label: str
    images: np.ndarray
    stock: bool = False
    heads_group: bool = False


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
    figure = empty_figure(grid.width, grid.height)
    lefts = iter(grid.lefts)
    for block in blocks:
        for j, heading in enumerate(block.columns):
            left = next(lefts)
            if j == 0:
                grid.text(figure, left, 0.3, block.title, fontsize=14, fontweight="bold")
            lines = "\n".join(heading.split())
            grid.text(
                figure,
                left + grid.cell / 2,
                grid.tops[0] - 0.06,
                lines,
                fontsize=10,
                ha="center",
                va="bottom",
            )
    for row, top in zip(rows, grid.tops, strict=True):
        grid.text(figure, grid.lefts[0] - 0.12, top + grid.cell_height / 2, _filled(row.label), fontsize=11, ha="right",
                  linespacing=1.35, color=GREY if row.stock else COLOURS[0])  # fmt: skip
        for image, left in zip(row.images, grid.lefts, strict=True):
            grid.picture(figure, left, top, image)
    return figure


def comparison_figure(
    labels: Sequence[str], pictures: Sequence[np.ndarray | None], errors: Sequence[float]
) -> Figure:
    """Stock solver, D-ODE solver and teacher: their pictures, and how the first two differ from the third; or the
    errors as bars where there are no pictures.

    Args:
        labels: words for each of the three.
        pictures: of each, ``[N, H, W, 3]``, 0 to 1, the same N noises in each, of which the first eight are shown;
            or None.
        errors: of the first two, their distance to the third.

    Raises:
        DodeError: there is no matplotlib.
    """
    if any(images is None for images in pictures):
        figure, (ax,) = panel_grid(1, 1)
        places = range(len(errors))
        ax.barh(places, errors, color=(GREY, COLOURS[0]), height=0.5)
        ax.set_yticks(places, list(map(_filled, labels[: len(errors)])), parse_math=False)
        ax.invert_yaxis()
        words(ax, "", "distance to the teacher (RMS)", "")
        return figure
    count = len(np.asarray(pictures[0]))
    rows = [
        PictureRow(label, np.asarray(images)[:_MOST_SHOWN], stock=i != 1)
        for i, (label, images) in enumerate(zip(labels, pictures, strict=True))
    ]
    *few, teacher = rows
    rows += [
        PictureRow(
            f"{name} − teacher, × {_MAGNIFIED}",
            _MAGNIFIED * np.abs(row.images - teacher.images),
            stock=row.stock,
            heads_group=row.stock,
        )
        for name, row in zip(("stock", "D-ODE"), few, strict=True)
    ]
    shown = len(teacher.images)
    title = "" if shown == count else f"the first {shown} of {count} noises"
    return picture_grid(rows, [Block(title, [str(i + 1) for i in range(shown)])])


def ranking_figure(names: Sequence[str], distances: Sequence[float]) -> Figure:
    """How far stock settings end from the teacher, as bars, the best first and coloured.

    Args:
        names: of the settings.
        distances: to the teacher's ends; those that are not finite are left out.

    Raises:
        DodeError: there is no matplotlib.
    """
    shown = [pair for pair in zip(names, distances, strict=True) if np.isfinite(pair[1])]
    figure, (ax,) = panel_grid(1, 1)
    figure.set_figheight(1.2 + 0.28 * len(shown))
    places = range(len(shown))
    colours = [COLOURS[0] if i == 0 else GREY for i in places]
    ax.barh(places, [distance for _, distance in shown], color=colours, height=0.7)
    ax.set_yticks(places, [name for name, _ in shown], parse_math=False)
    ax.invert_yaxis()
    words(ax, "", "distance to the slow sampler (geometric mean over noises)", "")
    return figure


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
        lines = max(1, *(len(heading.split()) for block in blocks for heading in block.columns))
        top = (0.85 if any(block.title for block in blocks) else 0.4) + _LINE_HEIGHT * (lines - 1)
        return cls(cell, cell_height, _places(2.9, cell, starts), _places(top, cell_height, heads))

    @property
    def width(self) -> float:
        return self.lefts[-1] + self.cell + 0.15

    @property
    def height(self) -> float:
        return self.tops[-1] + self.cell_height + 0.15

    def text(self, figure: Figure, x: float, y: float, words: str, va: str = "center", **style: Any) -> None:
        figure.text(x / self.width, 1 - y / self.height, words, va=va, parse_math=False, **style)

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


def _filled(label: str) -> str:
    """In lines that have room at the left of a row."""
    return "\n".join(textwrap.fill(line, _LINE) for line in label.splitlines())


def _places(first: float, size: float, gaps: Sequence[bool]) -> list[float]:
    """Where things of one size begin, side by side, with a gap before some."""
    return [first + i * size + 0.25 * sum(gaps[: i + 1]) for i in range(len(gaps))]
