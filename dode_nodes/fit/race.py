"""The race of starts: which solver, on which schedule, a fit begins with, and which stock setting is the one to beat.

Every single-stage linear multistep sampler is a member of the family that is fitted (``multistep``), with its first
step free or not. Where a fit begins decides by up to three times where it ends, so a list of them is raced by
successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): a few latents for all, more for those in front.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DodeError
from ..sampling.denoiser import Denoiser, history_corrections, history_weights
from ..sampling.multistep import as_history
from ..sampling.solvers import resolve
from ..sigmas import equal_sigma
from ..tables.free_outputs import NONE, FreeOutputs
from ..tables.provenance import StockSetting
from ..tables.row import LambdaRow
from .family import same_student
from .levenberg_marquardt import LeastSquaresProblem, geometric_mean
from .student import Student

MakeSigmas = Callable[[str, int, bool], Tensor]
"""A host's schedules: of this scheduler, with so many steps, without the penultimate σ or with it. May raise
``DodeError``."""

SOLVERS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("ipndm", MappingProxyType({"max_order": 2})),
    ("ipndm", MappingProxyType({"max_order": 3})),
    ("deis", MappingProxyType({})),
    ("dpmpp_2m", MappingProxyType({})),
)
ALSO_STOCK: tuple[tuple[str, Mapping[str, Any]], ...] = (("gradient_estimation", MappingProxyType({})),)
"""Of hosts that have it, and with no first step that is free: the best on some networks with few steps. (uni_pc is best
on others, but a KSampler runs it without the penultimate σ whatever one chooses.)"""
SCHEDULES: Mapping[tuple[bool, bool], tuple[tuple[str, bool], ...]] = {
    (False, True): (("karras", True), ("beta", False), ("beta", True)),
    (False, False): (("karras", True), ("karras", False), ("exponential", True)),
    (True, True): (("beta", False), ("beta", True), ("simple", True)),
    (True, False): (("beta", False), ("simple", False), ("simple", True)),
}
"""(flow, few steps) → schedulers, with whether the penultimate σ is left out. Picked once, from what won on the
embedded models."""

_FEW = 8  # evaluations: from here on, the last one pays as much as the others
_VERY_FEW = 4  # below
_HEAT = 4
"""Latents of a heat. After each, the better half goes on."""
_HEATS = 3


@dataclass(frozen=True, eq=False)
class Entrant:
    """A start of a fit.

    Attributes:
        name: in words.
        student: it, as weights over the history.
        solver, options, scheduler, discard_penultimate, lender: what it is made of.
        distances: to the teacher's ends, of the latents that it has run.
    """

    name: str
    student: Student = field(repr=False)
    solver: str
    options: Mapping[str, Any]
    scheduler: str
    discard_penultimate: bool
    lender: Denoiser | None = field(default=None, repr=False)
    distances: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)

    @property
    def is_stock(self) -> bool:
        """Whether a sampler runs so with no weights at all."""
        return not self.student.free.first

    def as_row(self) -> LambdaRow:
        """What it runs, as a row for Euler."""
        queries = self.student.queries
        weights = history_weights(self.student.corrections)
        return LambdaRow("euler", self.student.sigmas, (1,) * queries, weights, "noise", form="history")

    def setting(self, error: float, latents: int, tried: int) -> StockSetting:
        """As a row keeps it: how near it comes, on how many latents, and the best of how many."""
        name = ", ".join([self.solver, *(f"{key} {value}" for key, value in self.options.items())])
        return StockSetting(name, self.scheduler, error, latents, self.discard_penultimate, tried)

    def with_evaluations(self, evaluations: int, make_sigmas: MakeSigmas) -> Entrant | None:
        """The same with so many evaluations; None where there is no such schedule."""
        first, free = float(self.student.sigmas[0]), self.student.free.first
        student = _student(
            evaluations, first, self.solver, self.options, self.scheduler, self.discard_penultimate, free,
            make_sigmas, self.lender,
        )  # fmt: skip
        return None if student is None else replace(self, student=student, distances=np.empty(0))

    @property
    def mean(self) -> float:
        """The geometric mean of its distances: a few latents that end elsewhere do not decide."""
        return geometric_mean(self.distances)


def entrants(
    evaluations: int,
    sigma: float,
    *,
    flow: bool,
    make_sigmas: MakeSigmas,
    lender: Denoiser | None,
    free_first: bool = True,
) -> list[Entrant]:
    """Who enters, for so many evaluations from this first σ on; each only once. ``free_first``: also those whose first
    step is free."""
    found: list[Entrant] = []
    schedules = SCHEDULES[flow, evaluations < _FEW]
    for (scheduler, discard), (solver, options), free in [
        *product(schedules, SOLVERS, (False, True)[: 1 + free_first]),
        *product(schedules, ALSO_STOCK, (False,)),
    ]:
        student = _student(evaluations, sigma, solver, options, scheduler, discard, free, make_sigmas, lender)
        if student is None or any(same_student(student, other.student) for other in found):
            continue
        words = [
            " ".join([solver, *(f"order {value}" for value in options.values())]),
            scheduler,
            *(["no penultimate"] if discard else []),
            *(["first step free"] if free else []),
        ]
        found.append(Entrant(", ".join(words), student, solver, options, scheduler, discard, lender))
    return found


def entrant_of(
    setting: StockSetting, evaluations: int, sigma: float, make_sigmas: MakeSigmas, lender: Denoiser | None
) -> Entrant | None:
    """The inverse of ``Entrant.setting``; None where this host cannot run it."""
    solver, options = setting.solver_and_options()
    scheduler, discard = setting.scheduler, setting.discard_penultimate
    student = _student(evaluations, sigma, solver, options, scheduler, discard, False, make_sigmas, lender)
    if student is None:
        return None
    return Entrant(setting.sampler, student, solver, options, scheduler, discard, lender)


def schedule_from(
    sigma: float, make_sigmas: MakeSigmas, scheduler: str, steps: int, discard: bool = False
) -> Tensor | None:
    """The host's schedule of so many steps that begins at this σ; None where it has none."""
    try:
        sigmas = make_sigmas(scheduler, steps, discard)
    except DodeError:
        return None
    fits = len(sigmas) == steps + 1 and equal_sigma(float(sigmas[0]), sigma)
    return sigmas if fits else None


def _student(
    evaluations: int,
    sigma: float,
    solver: str,
    options: Mapping[str, Any],
    scheduler: str,
    discard: bool,
    free: bool,
    make_sigmas: MakeSigmas,
    lender: Denoiser | None,
) -> Student | None:
    """None where this is no linear multistep method, or the schedule has another number of steps or start."""
    queries = evaluations + free
    schedule = schedule_from(sigma, make_sigmas, scheduler, queries, discard)
    if schedule is None:
        return None
    sigmas = schedule.cpu().double().numpy()
    try:
        weights = as_history(
            resolve(solver), sigmas, np.zeros((queries, queries)), "noise", options=options, model=lender
        )
    except DodeError:
        return None
    if weights is None:
        return None
    which = FreeOutputs(first=True) if free else NONE
    return Student(resolve("euler"), "noise", sigmas, history_corrections(weights[None]), free=which)


Favourites = Mapping[str, Sequence[str]]
"""Of kinds of runners, the names of those that went on after the first heat of an earlier race: of the same model, with
another number of evaluations. The others need not enter again."""


def kinds_of(evaluations: int) -> tuple[str, str]:
    """Of the runners with so many: those that are stock, and those whose first step is free. With very few, a race is
    cheap, and many settings are the same, so that those of other numbers tell little."""
    number = str(evaluations) if evaluations < _VERY_FEW else "few" if evaluations < _FEW else "many"
    return f"stock, {number} evaluations", f"first step free, {number} evaluations"


def admitted(runners: Sequence[Entrant], favourites: Favourites) -> list[Entrant]:
    """Who enters, where favourites are known: the better half of their kind, and no more, for so it is planned before
    anybody knows them."""
    left_out: set[str] = set()
    for kind, members in _by_kind(runners).items():
        if kind in favourites:
            members.sort(key=lambda each: each.name not in favourites[kind])
            left_out.update(each.name for each in members[half(len(members)) :])
    return [each for each in runners if each.name not in left_out]


def favourites_of(ranked: Sequence[Entrant]) -> dict[str, list[str]]:
    """Of all that entered a race, best first."""
    return {
        kind: [each.name for each in members[: half(len(members))]]
        for kind, members in _by_kind(ranked).items()
    }


def _by_kind(runners: Sequence[Entrant]) -> dict[str, list[Entrant]]:
    found: dict[str, list[Entrant]] = {}
    for each in runners:
        stock, free = kinds_of(each.student.evaluations)
        found.setdefault(stock if each.is_stock else free, []).append(each)
    return found


On = Callable[[Sequence[int]], LeastSquaresProblem]
"""Makes the problem of running the latents of these numbers."""


def race(runners: Sequence[Entrant], latents: Sequence[int], on: On) -> list[Entrant]:
    """All of them, best first: who ran in more heats before who ran in fewer. Those that are stock and those that are not
    run apart.

    Args:
        runners: who enters.
        latents: numbers of those that are fitted; each heat takes the next few.
        on: see ``On``.
    """
    out: list[Entrant] = []
    for heat in _heats(len(latents)) if runners else []:
        problem = on([latents[i] for i in heat])
        ran = sorted((_further(each, problem) for each in runners), key=_order)
        kinds = [[each for each in ran if each.is_stock == stock] for stock in (True, False)]
        runners = [each for kind in kinds for each in kind[: half(len(kind))]]
        out = [*(each for each in ran if each not in runners), *out]
    return [*sorted(runners, key=_order), *out]


def stock_among(runners: Sequence[Entrant]) -> int:
    """How many of them are stock settings."""
    return sum(each.is_stock for each in runners)


def race_cost(runners: Sequence[Entrant], latents: int) -> int:
    """Evaluations of one latent that ``race`` takes."""
    counts = _counts(runners)
    total = 0
    for heat in _heats(latents):
        total += len(heat) * sum(counts) * runners[0].student.evaluations if runners else 0
        counts = [half(count) for count in counts]
    return total


def finalists(runners: Sequence[Entrant]) -> int:
    """How many are left after the heats."""
    counts = _counts(runners)
    for _ in range(_HEATS):
        counts = [half(count) for count in counts]
    return sum(counts)


def _counts(runners: Sequence[Entrant]) -> list[int]:
    """Those that are stock, and the others: they run apart."""
    return [stock_among(runners), len(runners) - stock_among(runners)]


def _heats(latents: int) -> list[range]:
    """Which latents each heat takes: no two the same, as long as there are enough."""
    size = max(1, min(_HEAT, latents // _HEATS))
    starts = [min(i * size, latents - size) for i in range(_HEATS)]
    return [range(start, start + size) for start in starts]


def half(count: int) -> int:
    """How many of so many go on after a heat."""
    return (count + 1) // 2


def _further(entrant: Entrant, problem: LeastSquaresProblem) -> Entrant:
    ran = problem.trial(entrant.student).distances
    return replace(entrant, distances=np.concatenate([entrant.distances, ran]))


def _order(entrant: Entrant) -> float:
    return entrant.mean
