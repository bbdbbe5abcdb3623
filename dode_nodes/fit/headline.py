"""How near rows come on latents that nothing was fitted or chosen on: the figures that people are told.

What is fitted looks best where it was fitted, and what is chosen looks best where it was chosen. These latents have a
run of the teacher of their own, and nothing follows from what is found on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..sampling.solvers import Sampler, resolve
from ..tables.provenance import Distances, StockSetting, Unseen
from ..tables.row import LambdaRow
from .evaluator import Evaluator
from .held_out import distances_between, distances_of, ends_of
from .latents import Latents, MicroBatch
from .progress import Progress
from .race import Entrant, MakeSigmas
from .stock import steps_needed
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
        stock: the best stock setting that a race has found; None for the row's plain solver.
        setting: its name.
    """

    row: LambdaRow
    solver: Sampler
    plain_solver: Sampler
    schedule: int
    stock: Entrant | None = None
    setting: StockSetting | None = None

    def against(self) -> tuple[LambdaRow, Sampler]:
        """What runs as stock."""
        if self.stock is not None:
            return _as_run(self.stock)
        return self.row.plain, self.plain_solver


def _as_run(entrant: Entrant) -> tuple[LambdaRow, Sampler]:
    row = entrant.as_row()
    return row, resolve(row.solver)


class Headline:
    """The figures of rows, over latents of their own.

    Args:
        teacher: the same teacher as the fit's, planned for the latents.
        make_sigmas: the host's schedules, to try the best stock setting with more evaluations; None for no such trial.
    """

    def __init__(self, teacher: TeacherRun, make_sigmas: MakeSigmas | None = None) -> None:
        self._teacher = replace(teacher, passes=teacher.passes[:1])  # its own error is known from the fit
        self._make_sigmas = make_sigmas

    @property
    def latents(self) -> Latents:
        """Those that nothing is fitted or chosen on."""
        return self._teacher.latents

    def cost(self, evaluations: Sequence[int], of_schedules: Sequence[int]) -> int:
        """At most, in evaluations of one latent, for rows with so many evaluations each, and as many of stock.

        Args:
            of_schedules: evaluations of the rows for each schedule.
        """
        trials = 0 if self._make_sigmas is None else sum(map(_most_trials, of_schedules))
        return self._teacher.cost + (2 * sum(evaluations) + trials) * len(self.latents)

    def __call__(self, contenders: Sequence[Contender], progress: Progress) -> list[LambdaRow]:
        """The rows with their figures; without, where a run did not end in finite numbers."""
        with progress:
            teaching, measuring = progress.split(self._teacher.cost, progress.total - self._teacher.cost)
            targets = self._teacher(teaching)
            with measuring:
                far = _Distances(targets, Evaluator(measuring))
                rows = [_measured(each, far) for each in contenders]
                used = _used(contenders)
                return [
                    self._with_needs(row, each, far) if each in used else row
                    for row, each in zip(rows, contenders, strict=True)
                ]

    def _with_needs(self, row: LambdaRow, contender: Contender, far: _Distances) -> LambdaRow:
        """With the evaluations that the stock setting needs to come as near."""
        stock, unseen = contender.stock, row.unseen
        if (
            stock is None
            or unseen is None
            or self._make_sigmas is None
            or unseen.stock.rms <= unseen.dode.rms
            or not unseen.corresponds
        ):
            return row
        make_sigmas = self._make_sigmas

        def error_with(evaluations: int) -> float:
            tried = stock.with_evaluations(evaluations, make_sigmas)
            return math.inf if tried is None else Distances.over(far(*_as_run(tried))).rms

        needs = steps_needed(row.nfe, unseen.dode.rms, error_with)
        return replace(row, unseen=replace(unseen, stock_needs=needs))


def _most_trials(evaluations: int) -> int:
    """Evaluations of bisecting what lies between so many and twice as many."""
    return 2 * evaluations * math.ceil(math.log2(evaluations + 1))


def _used(contenders: Sequence[Contender]) -> list[Contender]:
    """Of each schedule's rows the one that will be used: by its held-out error."""
    schedules = dict.fromkeys(each.schedule for each in contenders)
    return [
        min(
            (each for each in contenders if each.schedule == schedule), key=lambda each: each.row.error_from()
        )
        for schedule in schedules
    ]


class _Distances:
    """How far each latent ends from the teacher's end, of whatever runs. The same run, as rows with one stock setting and
    trials of it with more evaluations have it, is made once."""

    def __init__(self, targets: Targets, evaluator: Evaluator) -> None:
        self.targets = targets
        self._evaluator = evaluator
        self._known: dict[tuple[str, Sampler], np.ndarray] = {}

    def __call__(self, row: LambdaRow, solver: Sampler) -> np.ndarray:
        key = row.sha256, solver
        if key not in self._known:
            batches = self.targets.latents.batches()
            self._known[key] = distances_of(row, solver, self.targets, batches, self._evaluator, _STAGE)
        return self._known[key]

    def ends(self, row: LambdaRow, solver: Sampler) -> list[Tensor]:
        """Where they end, per micro-batch."""
        return ends_of(row, solver, self.targets, self.targets.latents.batches(), self._evaluator, _STAGE)


def _measured(contender: Contender, far: _Distances) -> LambdaRow:
    row, targets = contender.row, far.targets
    batches = targets.latents.batches()
    ends = far.ends(row, contender.solver)
    dode = distances_between(ends, targets, batches)
    stock = far(*contender.against())
    if not np.isfinite([*dode, *stock]).all():
        return replace(row, unseen=None)
    nearer = float((dode < stock).mean())
    others = _to_others(ends, targets, batches) if targets.latents.have_another_teacher else None
    unseen = Unseen(
        len(targets.latents), Distances.over(dode), Distances.over(stock), nearer, to_others=others
    )
    return replace(row, unseen=unseen, best_stock=contender.setting or row.best_stock)


def _to_others(ends: Sequence[Tensor], targets: Targets, batches: Sequence[MicroBatch]) -> float | None:
    """RMS distance to where the teacher ends from the other noises of the same group; None where there are none."""
    squares = []
    mine = targets.latents.by_group(batches, ends)
    for own, taught in zip(mine, targets.ends, strict=True):
        between = torch.cdist(own.double().flatten(1), taught.double().flatten(1)).square() / own[0].numel()
        squares.append(between[~torch.eye(len(own), dtype=torch.bool)])
    every = torch.cat(squares)
    return float(every.mean().sqrt()) if len(every) else None
