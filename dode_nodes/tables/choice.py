"""Choosing a row of a table for what is to be run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DodeError
from .row import LambdaRow
from .table import LambdaTable, plain_rows

NEAR_CFG, NEAR_SIZE = 1.25, 2.0
"""What counts as the guidance and the size that a row was made with, as ratios: beyond it the nodes warn."""
_TOO_STRONG = 1.6
"""Times the guidance that a row was made with. Refined weights are worse than stock at twice that, and far better at 1.5
times (docs/measurements.md, transfer)."""


class Part(NamedTuple):
    """The last steps of a row's schedule.

    Attributes:
        row: the row.
        start: the step that the run begins with; the number of steps where nothing is to be run.
    """

    row: LambdaRow
    start: int

    @property
    def steps(self) -> int:
        """How many of them cost an evaluation of the network."""
        return min(self.row.steps - self.start, self.row.paid_steps)

    @property
    def evaluations(self) -> int:
        """Of the network: some solvers make several a step."""
        return min(sum(self.row.evaluations[self.start :]), self.row.nfe)

    @property
    def sigmas(self) -> Tensor:
        """What is run over, float32; empty where nothing is."""
        if self.start == self.row.steps:
            return torch.empty(0)
        return torch.tensor(self.row.sigmas[self.start :], dtype=torch.float32)


def steps_of(steps: int, denoise: float) -> int:
    """How many of a row's steps a denoise runs."""
    asked = round(steps * denoise, 6)  # 25 × 0.58 is a half
    return max(math.floor(asked + 0.5), 1 if denoise > 0 else 0)


def rows_of(table: LambdaTable, solver: str | None = None) -> list[LambdaRow]:
    """The rows that serve a solver; all of them for None.

    Raises:
        DodeError: there is none; names what the table has.
    """
    rows = [row for row in table.rows if solver is None or row.serves(solver)]
    if not rows:
        raise DodeError(f"this λ table has no row for the solver '{solver}'. It has: {table.contents()}")
    return rows


def part_for_steps(
    table: LambdaTable,
    steps: int,
    denoise: float = 1.0,
    solver: str | None = None,
    cfg: float | None = None,
    *,
    nearest: bool = False,
) -> Part:
    """The row of this many steps, and where to begin: at its last steps · denoise steps.

    ``nearest``: where no row has this many, those that are nearest, and of two numbers the larger.

    Halves are rounded up, and a denoise above 0 runs at least one step.

    Of several rows the one with the smallest held-out error from that start on is taken, then the first. Of a part,
    a row's plain solver is taken where it was found to be nearer from that start. Where the guidance is too strong for
    refined rows, only the others are looked at; without others, the plain solver.

    Raises:
        DodeError: the table has no such row, or none that can be started there.
    """
    serving = rows_of(table, solver)
    count = nearest_steps(serving, steps) if nearest else steps
    rows = [row for row in serving if asked_steps(row) == count]
    if not rows:
        raise DodeError(f"choose another number of steps than {steps}: {steps_text(serving)}")
    rows = [row for row in rows if stands(row, cfg)] or [row.plain for row in rows]
    parts = [_part(row, steps_of(row.paid_steps, denoise)) for row in rows]
    plain = (_part(row, steps_of(row.paid_steps, denoise)) for row in plain_rows(rows))
    parts += [part for part in plain if 0 < part.start < part.row.steps]
    able = [part for part in parts if part.start == part.row.steps or part.row.evaluations[part.start]]
    if not able:
        row = parts[0].row
        starts = [n for n in range(1, row.steps + 1) if row.evaluations[row.steps - n]]
        raise DodeError(
            f"{row.solver} cannot run only the last {parts[0].steps} of these {row.steps} steps. "
            f"It can run {starts}"
        )
    return min(
        able,
        key=lambda part: (part.row.error_from(min(part.start, part.row.steps - 1)), part.row.error_from()),
    )


def stands(row: LambdaRow, cfg: float | None) -> bool:
    """Whether a row may be used at this guidance; None where it is not known."""
    _, high = cfg_range(row)
    return cfg is None or high is None or not row.is_refined or cfg <= _TOO_STRONG * high


def cfg_range(row: LambdaRow) -> tuple[float | None, float | None]:
    """The guidance that a row was made with, from the weakest to the strongest; None where it is not known."""
    made_at = row.settings.get("cfg")
    low, high = row.settings.get("cfg_range", (made_at, made_at))
    return low, high


def _part(row: LambdaRow, steps: int) -> Part:
    """The last steps of a row; all of them with the one that is free, if there is one."""
    return Part(row, 0 if steps == row.paid_steps else row.steps - steps)


def nearest_steps(rows: Sequence[LambdaRow], steps: int) -> int:
    """The rows' number of steps that is nearest; of two, the larger."""
    return min(map(asked_steps, rows), key=lambda count: (abs(count - steps), -count))


def steps_text(rows: Sequence[LambdaRow]) -> str:
    """Which numbers of steps there are, in few words."""
    counts = [str(count) for count in sorted(set(map(asked_steps, rows)))]
    several = f"{', '.join(counts[:-1])} and {counts[-1]}" if counts[1:] else counts[0]
    return f"this table has {several} step{'' if several == '1' else 's'}"


def asked_steps(row: LambdaRow) -> int:
    """The number that a KSampler is given for this schedule: some schedulers make more steps of it."""
    steps: int = row.settings.get("steps", row.paid_steps)
    return steps
