"""What there is to see in a figure."""

from __future__ import annotations

import io


def axes(figure) -> list:
    """Its panels, in order."""
    return list(figure.axes)


def labels(ax) -> list[str]:
    """The words of its legend."""
    return ax.get_legend_handles_labels()[1]


def png_size(figure) -> tuple[int, int]:
    """(width, height) of the figure as PNG, in pixels."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    header = file.getvalue()[16:24]
    return int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")
