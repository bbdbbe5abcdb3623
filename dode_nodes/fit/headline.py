"""How near rows come on latents that nothing was fitted or chosen on: the figures that people are told.

What is fitted looks best where it was fitted, and what is chosen looks best where it was chosen. These latents have a
run of the teacher of their own, and nothing follows from what is found on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..sampling.solvers import Sampler, resolve
from ..tables.provenance import Distances, StockSetting, Unseen
from ..tables.row import LambdaRow
from .evaluator import Evaluator
from .held_out import distances_of
from .latents import Latents
from .progress import Progress
from .teacher import Targets, TeacherRun

LATENTS = 8
"""How many are enough for a figure."""
_STAGE = "unseen latents"


@dataclass(frozen=True, eq=False)
class Contender:
    """A row of a table, and what it is measured against.

    Attributes:
        row: the row.
        solver: its sampler.
        plain_solver: that of its plain solver.
        schedule: number of the one that it was made for.
        stock: the best stock setting that a race has found, as a row for Euler; None for the row's plain solver.
        setting: its name.
    """

    row: LambdaRow
    solver: Sampler
    plain_solver: Sampler
    schedule: int
    stock: LambdaRow | None = None
    setting: StockSetting | None = None

    def against(self) -> tuple[LambdaRow, Sampler]:
        """What runs as stock."""
        if self.stock is not None:
            return self.stock, resolve(self.stock.solver)
        return self.row.plain, self.plain_solver


class Headline:
    """The figures of rows, over latents of their own.

    Args:
        teacher: the same teacher as the fit's, planned for the latents.
    """

    def __init__(self, teacher: TeacherRun) -> None:
        self._teacher = replace(teacher, passes=teacher.passes[:1])  # its own error is known from the fit

    @property
    def latents(self) -> Latents:
        """Those that nothing is fitted or chosen on."""
        return self._teacher.latents

    def cost(self, evaluations: Sequence[int]) -> int:
        """At most, in evaluations of one latent, for rows with so many evaluations each, and as many of stock."""
        return self._teacher.cost + 2 * sum(evaluations) * len(self.latents)

    def __call__(self, contenders: Sequence[Contender], progress: Progress) -> list[LambdaRow]:
        """The rows with their figures; without, where a run did not end in finite numbers."""
        with progress:
            teaching, measuring = progress.split(self._teacher.cost, progress.total - self._teacher.cost)
            targets = self._teacher(teaching)
            with measuring:
                evaluator = Evaluator(measuring)
                return [_measured(each, targets, evaluator) for each in contenders]


def _measured(contender: Contender, targets: Targets, evaluator: Evaluator) -> LambdaRow:
    row, batches = contender.row, targets.latents.batches()
    dode, stock = (
        distances_of(runs, solver, targets, batches, evaluator, _STAGE)
        for runs, solver in ((row, contender.solver), contender.against())
    )
    if not np.isfinite([*dode, *stock]).all():
        return replace(row, unseen=None)
    nearer = float((dode < stock).mean())
    unseen = Unseen(len(targets.latents), Distances.over(dode), Distances.over(stock), nearer)
    return replace(row, unseen=unseen, best_stock=contender.setting or row.best_stock)
