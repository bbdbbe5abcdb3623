"""What a refinement may try, and what that costs: known before the teacher runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import DodeError
from ..sampling.sample import solver_of
from ..sampling.solvers import Sampler
from ..sigmas import is_flow
from ..tables.free_outputs import GaussianPrior
from ..tables.row import LambdaRow
from .family import Family, in_bands, with_gaussian, with_start
from .held_out import later_starts_cost
from .latents import held_out_count
from .levenberg_marquardt import RUNS
from .race import Entrant, Favourites, MakeSigmas, admitted, entrants, finalists, half, race_cost
from .student import Student, first_changed, jacobian_cost
from .teacher import Targets, TeacherRun

JACOBIANS = 4
"""At most, of the family of weights and σ, and of all that widens it at once; on latents outside of the fit more were no
better."""
FEW_JACOBIANS = 3
"""At most, where a budget is for one leader on few latents: a fourth gains nothing there (docs/measurements.md)."""
WIDE_JACOBIANS = 2
"""At most, for each part by which the family is widened."""
LEADERS = 3
"""Starts that go one Jacobian further; the better half of them goes another one, and so on until one is left."""
BANDS = 2
UNIT = 10
"""A budget is a multiple of so many evaluations for each of the row's, on all latents of the fit: the paper's teacher."""
SOME_LATENTS = 8
"""A budget pays for three Jacobians of one leader on so many latents before it pays for more leaders and latents."""
FEW_LATENTS = 4
"""On so many it pays for three Jacobians of one leader before it pays for more latents: those on four latents come nearer
than two on eight, for less (docs/measurements.md)."""


@dataclass(frozen=True)
class Plan:
    """What a refinement may come to.

    Attributes:
        fitted: latents that are fitted.
        jacobians: at most, of weights and σ.
        leaders: starts that go one Jacobian further, see ``LEADERS``; 0 where none are raced first.
        kinds: of first steps, evaluated or free, from the best of which the family is widened then; 0 for no widening.
        fitting: evaluations of one latent each, at most: what a budget is compared with.
        checking: those of runs from later steps, at most.
    """

    fitted: int
    jacobians: int
    leaders: int
    kinds: int
    fitting: int
    checking: int

    @property
    def evaluations(self) -> int:
        """All of them, at most."""
        return self.fitting + self.checking

    @property
    def raced(self) -> bool:
        """Whether starts are raced first."""
        return self.leaders > 0


@dataclass(frozen=True, eq=False)
class Scope:
    """What a refinement may try, and what that costs.

    Attributes:
        family: of the row given.
        runners: who enters the race; none without the host's schedules.
        latents: of the fit, and how many are held out.
        checking: evaluations of runs from the later steps, at most.
    """

    family: Family
    runners: list[Entrant]
    latents: int
    held: int
    checking: int

    @classmethod
    def of(
        cls,
        row: LambdaRow,
        solver: Sampler,
        make_sigmas: MakeSigmas | None,
        teacher: TeacherRun | Targets,
        *,
        measured: bool = False,
        favourites: Favourites | None = None,
    ) -> Scope:
        """What it is for a row; ``measured`` and ``favourites`` as ``Refinement`` takes them.

        Raises:
            IneligibleSampler: the solver cannot serve.
            DodeError: it takes other steps than the row; or the row has one evaluation, and nothing with a free first
                step enters a race.
        """
        lender = teacher.latents.lender
        family = Family.of(row, solver, lender)
        runners: list[Entrant] = []
        if make_sigmas is not None and family.history:
            first, flow = float(row.sigmas[0]), is_flow(row.sigmas)
            free_first = teacher.latents.free_first
            everybody = entrants(
                row.nfe, first, flow=flow, make_sigmas=make_sigmas, lender=lender, free_first=free_first
            )
            runners = admitted(everybody, favourites or {})
        if row.nfe < 2 and not any(runner.student.free.first for runner in runners):
            raise DodeError(f"{row.label}: with one evaluation there is nothing to refine")
        # A refined σ is mostly not one that the teacher stopped at.
        approach = teacher.approach_cost if family.history else 0
        counts = (1, *row.evaluations) if runners else row.evaluations
        checking = later_starts_cost(teacher.latents, counts, approach=approach)
        if not measured:
            checking += later_starts_cost(teacher.latents, row.plain.evaluations, approach=approach)
        return cls(family, runners, len(teacher.latents), held_out_count(len(teacher.latents)), checking)

    @property
    def unit(self) -> int:
        """What a budget is a multiple of, in evaluations of one latent."""
        return UNIT * self.family.row.nfe * self.latents

    def plan(self, budget: float | None) -> Plan:
        """All that may pay, or what the budget pays for.

        Raises:
            DodeError: it pays for no Jacobian on one latent, or is no number.
        """
        if budget is not None and not budget > 0:
            raise DodeError(f"the refine budget must be a positive number, not {budget}")
        plans = [self._plan(*choice) for choice in self._preferred()]
        if budget is None:
            return plans[0]
        for plan in plans:
            if plan.fitting <= budget * self.unit:
                return plan
        raise DodeError(
            f"a refine budget of {budget:g} is too small: refining {self.family.row.label} takes at least "
            f"{plans[-1].fitting / self.unit:.2g}"
        )

    def _preferred(self) -> list[tuple[int, int, int, int]]:
        """(fitted latents, Jacobians, leaders of a race, kinds of first step that are widened), the most wanted first."""
        most = self.latents - self.held
        leaders, one = (LEADERS, 1) if self.runners else (0, 0)
        kinds = len({student.free.first for student in self._students()}) if self.family.history else 0
        some, few = min(SOME_LATENTS, most), min(FEW_LATENTS, most)
        return [
            *((most, JACOBIANS, leaders, widened) for widened in range(kinds, 0, -1)),
            *((fitted, JACOBIANS, leaders, 0) for fitted in range(most, some - 1, -1)),
            *((fitted, FEW_JACOBIANS, one, 0) for fitted in range(some, few - 1, -1)),
            *((few, jacobians, 0, 0) for jacobians in range(FEW_JACOBIANS, 0, -1)),
            *((fitted, 1, 0, 0) for fitted in range(few - 1, 0, -1)),
        ]

    def _students(self, raced: bool = True) -> list[Student]:
        """All that a fit may begin with."""
        return [*self.family.starts.values(), *(runner.student for runner in self.runners if raced)]

    def _plan(self, fitted: int, jacobians: int, leaders: int, kinds: int) -> Plan:
        runners = self.runners if leaders else []
        starts = self.family.most_starts + finalists(runners)
        descents = min(max(leaders, 1), starts)
        member = max(self._students(raced=leaders > 0), key=lambda student: student.queries)
        n = member.evaluations
        cost = starts * n * (fitted + self.held) + race_cost(runners, fitted)
        cost += _jacobians_of(descents, jacobians) * self._descent(member, fitted)
        if kinds:
            begun = with_start(member)
            wide = in_bands(begun, BANDS)
            prior = GaussianPrior(np.zeros(1), np.ones((2, 1, 1)))
            widest = with_gaussian(wide, prior)
            for student in (begun, wide, widest):
                cost += n * fitted + WIDE_JACOBIANS * self._descent(student, fitted)
            cost += (kinds - 1) * (n * fitted + jacobians * self._descent(widest, fitted))
        return Plan(fitted, jacobians, leaders, kinds, cost, self.checking)

    def _descent(self, student: Student, fitted: int) -> int:
        """Of one Jacobian at most: its differences, its steps, and a look at the latents held out."""
        parameters = self.family.parameters(student)
        n = student.evaluations
        steps = RUNS * (n - student.made_before(first_changed(parameters)))
        return (jacobian_cost(parameters, student) + steps) * fitted + n * self.held


def _jacobians_of(starts: int, jacobians: int) -> int:
    """Of all that set out, the better half going on after each."""
    total = 0
    for _ in range(jacobians):
        total += starts
        starts = half(starts)
    return total


def plan_refinement(
    teacher: TeacherRun,
    row: LambdaRow,
    budget: float | None = None,
    *,
    solver: str | Sampler | None = None,
    make_sigmas: MakeSigmas | None = None,
    measured: bool = False,
    favourites: Favourites | None = None,
) -> Plan:
    """What ``refine`` will do, to be told before the teacher runs.

    Args:
        teacher: the run whose targets it will have (``plan_teacher``).
        row: what it is to start from; of its weights nothing but their number matters.
        budget: as ``refine`` takes it.
        solver: the sampler itself, where the row was distilled on a callable.
        make_sigmas, measured, favourites: as ``Refinement`` takes them; of favourites the kinds count.

    Raises:
        DodeError: the budget is no positive number, or pays for nothing.
    """
    scope = Scope.of(
        row, solver_of(row, solver), make_sigmas, teacher, measured=measured, favourites=favourites
    )
    return scope.plan(budget)
