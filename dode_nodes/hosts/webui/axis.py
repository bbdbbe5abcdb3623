"""The λ table as an axis of the host's X/Y/Z plot."""

from __future__ import annotations

from typing import Any

from modules import scripts

from . import folders

_LABEL = "[D-ODE] λ table"


def add() -> None:
    """Once, if the host has the plot."""
    remove()
    plot = _plot()
    if plot is not None:
        plot.axis_options.append(plot.AxisOption(_LABEL, str, _apply, choices=folders.choices))


def remove() -> None:
    """As if it had never been there."""
    plot = _plot()
    if plot is not None:
        plot.axis_options[:] = [option for option in plot.axis_options if option.label != _LABEL]


def _apply(p: Any, name: str, all_names: list[str]) -> None:
    p.dode_axis = name


def _plot() -> Any:
    modules = (data.module for data in scripts.scripts_data)
    return next((module for module in modules if hasattr(module, "axis_options")), None)
