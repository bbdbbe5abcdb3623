"""The demo's results: a comparison to print, and a folder of pictures and numbers."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .. import __version__
from ..errors import DodeError
from ..tables import publish
from ..tables.describe import columns, number, percent, table_json
from ..tables.picture_grid import Block, PictureRow, picture_grid
from ..tables.plots import Curve, Panel, error_against_evaluations_figure, lambda_figure
from .experiment import Demo, Result, Trial, in_turns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("lambda.safetensors", "grid.png", "error.png", "lambda.png", "demo.json")

_COLUMNS = 10
_GRID_BUDGETS = 2  # the smallest, where pictures differ most
_AMPLIFIED = 4  # differences of digits: what is seen there is hard to see in the pictures


class Pair(NamedTuple):
    """A stock sampler, and a D-variant with as many evaluations."""

    what: str
    stock: Result
    dode: Result

    @property
    def closer(self) -> int:
        """How many latents the D-variant brings closer to the converged solution."""
        return int((self.dode.errors < self.stock.errors).sum())


def pairs(demo: Demo, budget: int) -> list[Pair]:
    """Each solver beside its own D-variant; then the best stock sampler of all beside the chosen D-variant."""
    own = [
        Pair(f"{dode.trial.solver} → {dode.trial.label}", demo.undistilled(dode), dode)
        for dode in demo.distilled(budget)
    ]
    best, chosen = demo.best_stock(budget), demo.chosen(budget)
    return [*own, Pair(f"best: {best.trial.solver} → {chosen.trial.label}", best, chosen)]


def comparison_text(demo: Demo) -> str:
    """D-variants beside stock samplers at equal evaluations, gains and losses alike."""
    latents, tried = len(demo.fresh_seeds), len(demo.stock(demo.budgets[0]))
    notes = [
        f"Error: RMS distance to the converged latent, over {latents} fresh latents. A few latents dominate it.",
        f"Closer: the number of latents, of {latents}, for which the D-variant is closer than the stock sampler.",
        f"Best: the best of {tried} stock samplers, chosen on these latents. It is compared with the D-variant that was",
        "best on its held-out latents.",
        "Refined: fitted end to end, from the D-variant that was best on the held-out latents. It has its own σ.",
        "−penultimate: made with one extra step, then the last σ before 0 is left out.",
        f"{_reference(demo)}.",
    ]
    lines: list[Sequence[str]] = [("", "schedule", "stock", "D-ODE", "change", "closer")]
    for budget in demo.budgets:
        lines.append((f"{budget} evaluations", *[""] * 5))
        for pair in pairs(demo, budget):
            schedules = dict.fromkeys(result.trial.on for result in (pair.stock, pair.dode))
            lines.append(
                (
                    f"  {pair.what}",
                    " → ".join(schedules),
                    number(pair.stock.error),
                    number(pair.dode.error),
                    percent(pair.dode.error, pair.stock.error),
                    f"{pair.closer} of {latents}",
                )
            )
    return "\n".join([*columns(lines, left=(0, 1)), "", *notes])


def _reference(demo: Demo) -> str:
    trial = demo.converged.trial
    return (
        f"Converged: {trial.solver}, {trial.evaluations} steps; "
        f"{number(demo.converged_error)} from its result at half the steps"
    )


def demo_json(demo: Demo, command: str, seconds: float) -> dict[str, Any]:
    """Every number of the demo, and what it takes to have them again."""
    return {
        "command": command,
        "seconds": round(seconds, 1),
        "versions": {
            "dode_nodes": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "settings": {
            "model": demo.model.name,
            "steps": list(demo.budgets),
            "cfg": demo.cfg,
            "seed": demo.seed,
            "latent_seeds": list(demo.latent_seeds),
            "fresh_seeds": list(demo.fresh_seeds),
            "subjects": list(demo.model.subjects),
        },
        "converged": _trial_json(demo.converged.trial) | {"from_half_the_steps": demo.converged_error},
        "comparison": [
            {
                "evaluations": budget,
                "what": pair.what,
                "stock": _trial_json(pair.stock.trial),
                "dode": _trial_json(pair.dode.trial),
                "stock_error": pair.stock.error,
                "dode_error": pair.dode.error,
                "closer": pair.closer,
            }
            for budget in demo.budgets
            for pair in pairs(demo, budget)
        ],
        "results": [_result_json(result) for result in demo.results],
        "table": table_json(demo.table),
    }


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "solver": trial.solver,
        "prediction": trial.row and trial.row.prediction,
        "schedule": trial.schedule,
        "discard_penultimate": trial.discard_penultimate,
        "evaluations": trial.evaluations,
    }


def _result_json(result: Result) -> dict[str, Any]:
    return _trial_json(result.trial) | {
        "error": result.error,
        "errors": result.errors.tolist(),
    }


@contextmanager
def results_folder(folder: Path) -> Iterator[Path]:
    """A folder to write results into; they all appear in ``folder`` at the end, or none does.

    Raises:
        DodeError: ``folder`` has results already, or cannot be written.
    """
    _refuse_results(folder)
    made = not folder.exists()
    try:
        publish.try_writing(folder)
    except OSError as error:
        raise DodeError(
            f"{folder} cannot be written ({error.strerror or error}): give another folder with --out"
        ) from error
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
            yield Path(part)
            _refuse_results(folder)  # of another demo that has ended meanwhile
            for file in Path(part).iterdir():
                file.rename(folder / file.name)
    finally:
        if made:
            with suppress(OSError):  # not empty: the results are there
                folder.rmdir()


def _refuse_results(folder: Path) -> None:
    present = [name for name in FILES if (folder / name).exists()]
    if present:
        stem = folder if folder.name else folder.resolve()  # "." has no name
        free = next(name for n in count(2) if not (name := Path(f"{stem}-{n}")).exists())
        raise DodeError(
            f"{folder} has {', '.join(present)} already, and nothing is overwritten: "
            f"give another folder, such as --out {free}"
        )


def write_results(demo: Demo, folder: Path, *, command: str, seconds: float) -> None:
    """Write ``FILES``.

    Raises:
        DodeError, OSError: there is no matplotlib, or a file cannot be written.
    """
    demo.table.save(folder / "lambda.safetensors")
    grid_figure(demo).savefig(folder / "grid.png")
    error_figure(demo).savefig(folder / "error.png")
    greedy = [row for row in demo.table.rows if not row.is_refined]
    lambda_figure(greedy).savefig(folder / "lambda.png")
    text = json.dumps(demo_json(demo, command, seconds), ensure_ascii=False, indent=1, allow_nan=False)
    (folder / "demo.json").write_text(text + "\n", encoding="utf-8")


def grid_figure(demo: Demo) -> Figure:
    """From the same noise by euler, the best stock sampler, the chosen D-variant, converged: the first fresh latents."""
    goal = _pictures(demo, demo.converged)
    subjects = in_turns(demo.model.subjects, len(goal))
    grey = goal.ndim == 3
    blocks = [Block(f"Same noise, same network ({demo.model.name}), cfg {demo.cfg:g}", subjects)]
    if grey:
        blocks.append(Block(f"Difference from converged, × {_AMPLIFIED}", subjects))

    def row(words: str, result: Result, heads_group: bool) -> PictureRow:
        images = _pictures(demo, result)
        if grey:
            images = np.concatenate([images, _AMPLIFIED * abs(images - goal)])
        return PictureRow(f"{words}\n{result.trial.on}", images, result.trial.row is None, heads_group)

    rows = []
    for budget in demo.budgets[:_GRID_BUDGETS]:
        best, chosen = demo.best_stock(budget), demo.chosen(budget)
        euler = demo.stock_on_schedule_of(chosen, "euler")
        for result in (euler, best, chosen):
            words = f"{budget} × {result.trial.label}, error {number(result.error)}"
            rows.append(row(words, result, heads_group=result is euler))
    trial = demo.converged.trial
    rows.append(row(f"converged: {trial.evaluations} × {trial.solver}", demo.converged, heads_group=True))
    return picture_grid(rows, blocks)


def _pictures(demo: Demo, result: Result) -> np.ndarray:
    """Of the first fresh latents, ``[N, H, W]`` or ``[N, H, W, 3]``, 0 to 1."""
    return demo.model.pictures(result.latents[:_COLUMNS]).numpy()


def error_figure(demo: Demo) -> Figure:
    """A panel per solver with its D-variants, and one of the best stock sampler and the chosen D-variants."""
    by_solver: dict[str, dict[str, list[Pair]]] = {}
    for budget in demo.budgets:
        for pair in pairs(demo, budget)[:-1]:
            variants = by_solver.setdefault(pair.stock.trial.solver, {})
            variants.setdefault(pair.dode.trial.label, []).append(pair)
    panels = []
    for solver, variants in by_solver.items():
        stock = [pair.stock for pair in next(iter(variants.values()))]
        schedules = dict.fromkeys(result.trial.on for result in stock)
        curves = [_curve(f"{solver}, {' / '.join(schedules)}", stock, stock=True)]
        curves += [_curve(label, [pair.dode for pair in found]) for label, found in variants.items()]
        panels.append(Panel(solver, curves))
    best = [demo.best_stock(budget) for budget in demo.budgets]
    chosen = [demo.chosen(budget) for budget in demo.budgets]
    tried = len(demo.stock(demo.budgets[0]))
    panels.append(
        Panel(
            "best of all",
            [_curve(f"best stock of {tried}", best, stock=True), _curve("chosen D-ODE", chosen)],
        )
    )
    note = f"Distance to the converged latent, {len(demo.fresh_seeds)} fresh latents. {_reference(demo)}"
    return error_against_evaluations_figure(panels, note)


def _curve(label: str, results: list[Result], stock: bool = False) -> Curve:
    return Curve(label, [r.trial.evaluations for r in results], [r.error for r in results], stock)
