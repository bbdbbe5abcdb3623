"""One run of the teacher, a student per schedule, the better prediction, refinement: from latents to rows.

The node 'Distill λ', ``python -m dode_nodes distill`` and the demo use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor

from ..errors import DodeError
from ..sampling.probe import solver_name
from ..sampling.sample import solver_beside
from ..sampling.solvers import Sampler, resolve
from ..tables.kept import Kept
from ..tables.provenance import StockSetting
from ..tables.row import LambdaRow
from .distill import GreedyStudent
from .headline import Contender, Headline
from .held_out import later_starts_cost, with_later_starts
from .latents import Latents
from .progress import Progress, Tell
from .race import Entrant, Favourites, favourites_of, kinds_of
from .recipe import Cost, Recipe
from .refine import Refinement
from .resume import RowsSoFar
from .scope import Plan, plan_refinement
from .stock import StockSearch
from .teacher import Targets

GOES_ON = "this was stopped before: it goes on from there, and needs less than that"


class Pipeline:
    """Distils solvers on several schedules, and refines the best row of each.

    Args:
        latents: what to fit on.
        schedules: the students' sigmas, each descending to 0.
        recipe: everything else.
        unseen: latents for the rows' figures: nothing is fitted or chosen on them. None for no such figures.
        kept: where the work is kept, for a run that is ended to go on from; None for nowhere.

    Raises:
        IneligibleSampler, DodeError: as ``distill`` and ``refine`` do; before any evaluation.

    Attributes:
        cost: what ``run`` may come to, known before.
        remarks: what the user should know before it starts, one line each.
        partial: where a refinement was ended, the best of it, if that is not the row it began with; else None.
        targets: the teacher's states, when it is done.
    """

    def __init__(
        self,
        latents: Latents,
        schedules: Sequence[Tensor],
        recipe: Recipe,
        unseen: Latents | None = None,
        kept: Kept | None = None,
    ) -> None:
        self._contenders: list[Contender] = []
        self.partial: LambdaRow | None = None
        self.targets: Targets | None = None
        self._recipe = recipe
        self._kept = kept
        self._or_stock = recipe.or_stock and bool(latents.held_out)
        taught, kept_rows, unseen_taught = (
            None if kept is None else kept.part(name) for name in ("teacher", "rows", "unseen")
        )
        self._teacher = replace(recipe.teacher_run(latents, schedules), kept=taught)
        self._students = [
            [GreedyStudent.probed(latents, sigmas, solver) for solver in recipe.solvers]
            for sigmas in schedules
        ]
        self._headline = None
        if unseen is not None:
            planned = replace(recipe.teacher_run(unseen, schedules), kept=unseen_taught)
            self._headline = Headline(planned, recipe.make_sigmas)
        self._so_far = RowsSoFar(kept_rows, recipe.make_sigmas, latents.lender)
        self._favourites: Favourites = {}
        self._raced_before: dict[int, frozenset[str]] = {}
        self._refinable = [
            i for i in range(len(schedules)) if recipe.refine_budget and self._can_be_refined(i)
        ]
        self.remarks = []
        if taught is not None and taught.exists():
            self.remarks.append(GOES_ON)
        if any(self.evaluations(i) == 1 and i not in self._refinable for i in range(len(schedules))):
            self.remarks.append("with one evaluation there is nothing to fit: this row is the plain solver")
        self._budget = recipe.refine_budget * _share_of_many(len(schedules))
        self._searches: dict[int, StockSearch] = {}
        self._plans: dict[int, Plan] = {}
        self._plan_all()
        self.cost = Cost(
            teacher=self._teacher.cost,
            students=tuple(sum(map(self._student_cost, students)) for students in self._students),
            refining=tuple(self._plans[i] for i in self._refinable),
            searching=tuple(map(self._searching_cost, range(len(schedules)))),
            unseen=0 if self._headline is None else self._headline.cost(*self._most_evaluations()),
        )

    @property
    def rows(self) -> list[LambdaRow]:
        """What has been found so far: greedy rows, then refined ones."""
        return [each.row for each in self._contenders]

    @property
    def found(self) -> list[LambdaRow]:
        """All rows that there are, wherever it was ended."""
        return self.rows if self.partial is None else [*self.rows, self.partial]

    def run(self, progress: Progress | Tell | None = None) -> list[LambdaRow]:
        """Everything: the greedy rows, in the schedules' order, then their refinements.

        Args:
            progress: told after every evaluation; what it raises ends the run, and passes on: ``rows`` and
                ``partial`` hold what there is by then.
        """
        self._contenders, self.partial, self._favourites = [], None, {}
        cost, steps = self.cost, self._steps()
        with Progress.of(progress, cost.total) as work:
            teaching, measuring, *parts = work.split(
                cost.teacher, cost.unseen, *(evaluations for _, evaluations in steps)
            )
            self.targets = self._teacher(teaching)
            done, self._contenders, self._favourites = self._so_far.load()
            for number, ((step, _), part) in enumerate(zip(steps, parts, strict=True)):
                with part:
                    if number >= done:
                        step(part)
                        self._so_far.save(number + 1, self._contenders, self._favourites)
            self._contenders.sort(key=_in_the_end)
            if self._headline is not None:
                measured = self._headline(self._contenders, measuring)
                pairs = zip(self._contenders, measured, strict=True)
                self._contenders = [replace(each, row=row) for each, row in pairs]
        return self.rows

    def _steps(self) -> list[tuple[Callable[[Progress], None], int]]:
        """From the teacher's states to the rows, each with its evaluations."""
        steps: list[tuple[Callable[[Progress], None], int]] = [
            (partial(self._greedy, i), evaluations) for i, evaluations in enumerate(self.cost.students)
        ]
        for i in self._most_first:
            steps.append((partial(self._find_stock, i), self.cost.searching[i]))
            if i in self._refinable:
                steps.append((partial(self._refine, i), self._plans[i].evaluations))
        return steps

    @property
    def _most_first(self) -> list[int]:
        """Schedules by their evaluations: with many of them no two settings of a race are the same, so that its
        favourites can be those of all."""
        return sorted(range(len(self._students)), key=self.evaluations, reverse=True)

    def evaluations(self, schedule: int) -> int:
        """Network evaluations of one picture on a schedule, of the student that needs most."""
        return max(len(student.queries.sigmas) for student in self._students[schedule])

    def _greedy(self, schedule: int, progress: Progress) -> None:
        """The rows of a schedule's students."""
        students = self._students[schedule]
        shares = progress.split(*map(self._student_cost, students))
        self._contenders += [
            Contender(self._row(student, share), student.run.solver, student.run.solver, schedule)
            for student, share in zip(students, shares, strict=True)
        ]

    def _row(self, student: GreedyStudent, progress: Progress) -> LambdaRow:
        """λ of one student, for the prediction that does better."""
        assert self.targets is not None  # noqa: S101  # the teacher has run
        predictions = self._recipe.predictions
        *fitting, checking = progress.split(*[student.cost] * len(predictions), student.later_starts)
        candidates = [
            student.fit(self.targets, prediction, self._recipe.settings, part)
            for prediction, part in zip(predictions, fitting, strict=True)
        ]
        row = min(candidates, key=LambdaRow.error_from)
        return with_later_starts(self.targets, row, student.run.solver, checking)

    def _find_stock(self, schedule: int, progress: Progress) -> None:
        """What a schedule's rows are measured against; a row of its own, where none of them comes as near."""
        if schedule not in self._searches or (search := self._search(schedule)) is None:
            return
        assert self.targets is not None  # noqa: S101  # the teacher has run
        searching, checking = progress.split(search.cost, progress.total - search.cost)
        found = search(self.targets, searching)
        self._note_race(favourites_of(found.ranked))
        mine = [each for each in self._contenders if each.schedule == schedule]
        nearest = min(each.row.error_from() for each in mine)
        if self._or_stock and found.setting.error < nearest:
            row = found.as_row(self.targets, mine[0].row.settings)
            solver = resolve(row.solver)
            row = with_later_starts(self.targets, row, solver, checking)
            self._contenders.append(Contender(row, solver, solver, schedule))
        self._measure_against(schedule, found.best, found.setting)

    def _measure_against(self, schedule: int, stock: Entrant | None, setting: StockSetting | None) -> None:
        self._contenders = [
            replace(each, stock=stock, setting=setting) if each.schedule == schedule else each
            for each in self._contenders
        ]

    def _refine(self, schedule: int, progress: Progress) -> None:
        """Refine the best of a schedule's rows; all of them are measured against the stock setting that this finds."""
        assert self.targets is not None  # noqa: S101  # the teacher has run
        mine = [each for each in self._contenders if each.schedule == schedule]
        best = min(mine, key=lambda contender: contender.row.error_from())
        row, own = best.row, best.solver
        if row.nfe < 2 <= self.evaluations(schedule):
            return
        refinement = Refinement(
            self.targets,
            row,
            solver=own if row.is_callable else None,
            budget=self._budget,
            make_sigmas=self._recipe.make_sigmas,
            measured=True,
            favourites=self._known_to(schedule),
            kept=None if self._kept is None else self._kept.part(f"refining-{schedule}"),
        )
        try:
            refined = refinement.run(progress)
        except BaseException:
            if refinement.best.origin.kind != row.origin.kind:
                self.partial = refinement.best
            raise
        solver, plain = (solver_beside(row, own, each.solver) for each in (refined, refined.plain))
        contender = replace(best, row=refined, solver=solver, plain_solver=plain)
        if refined.origin.kind == row.origin.kind:  # the same, and the report says that it was tried
            self._contenders[self._contenders.index(best)] = contender
        else:
            self._contenders.append(contender)
        self._note_race(refinement.favourites)
        if refinement.stock is not None:
            self._measure_against(schedule, refinement.stock, refined.best_stock)

    def _most_evaluations(self) -> tuple[list[int], list[int]]:
        """Of one picture by each row that there may be in the end; of those of each schedule."""
        counts = [[len(each.queries.sigmas) for each in students] for students in self._students]
        most = list(map(max, counts))
        refined = [most[i] for i in self._refinable]
        stock = [most[i] for i in self._searches if self._or_stock]
        return [*(count for of_schedule in counts for count in of_schedule), *refined, *stock], most

    def _search(self, schedule: int) -> StockSearch | None:
        """Where the host's schedules are known, and have such a setting."""
        make_sigmas = self._recipe.make_sigmas
        if make_sigmas is None:
            return None
        sigmas = self._students[schedule][0].run.sigmas
        try:
            return StockSearch(
                self._teacher, self.evaluations(schedule), sigmas, make_sigmas, self._known_to(schedule)
            )
        except DodeError:
            return None

    def _searching_cost(self, schedule: int) -> int:
        search = self._searches.get(schedule)
        if search is None:
            return 0
        if not self._or_stock:
            return search.cost
        counts = [1] * self.evaluations(schedule)
        approach = self._teacher.approach_cost
        return search.cost + later_starts_cost(self._teacher.latents, counts, approach=approach)

    def _student_cost(self, student: GreedyStudent) -> int:
        return len(self._recipe.predictions) * student.cost + student.later_starts

    def _can_be_refined(self, schedule: int) -> bool:
        """Of one evaluation only where the first step of two can be free."""
        if self.evaluations(schedule) > 1:
            return True
        try:
            self._plan(schedule, None)
        except DodeError:
            return False
        return True

    def _known_to(self, schedule: int) -> dict[str, Sequence[str]]:
        """The favourites of the races before it."""
        return {kind: self._favourites.get(kind, ()) for kind in self._raced_before.get(schedule, ())}

    def _note_race(self, favourites: Favourites) -> None:
        """Those of the first race of a kind stay: later ones had only them."""
        self._favourites = {**favourites, **self._favourites}

    def _plan_all(self) -> None:
        """What each schedule's refinement will do, and its search for the best stock setting where that races nobody."""
        raced: set[str] = set()
        for i in self._most_first:
            if math.isfinite(self._budget):  # without a limit there is nothing to save
                self._raced_before[i] = frozenset(raced)
            stock, free = kinds_of(self.evaluations(i))
            if i in self._refinable:
                self._plans[i] = self._plan_within_budget(i)
            if i in self._plans and self._plans[i].raced:
                raced |= {stock, free}
            elif (search := self._search(i)) is not None:
                self._searches[i] = search
                raced.add(stock)

    def _plan_within_budget(self, schedule: int) -> Plan:
        try:
            return self._plan(schedule, self._budget)
        except DodeError as error:
            given = self._recipe.refine_budget
            if given == self._budget:
                raise
            share = f"each of {len(self._students)} rows gets {self._budget / given:.2g} of the {given:g} that was given"
            raise DodeError(f"{error}. Raise it: {share}") from error

    def _plan(self, i: int, budget: float | None) -> Plan:
        """For the schedule's student that costs most: which of them will be refined is not known yet."""
        plans = []
        for student in self._students[i]:
            if len(student.queries.sigmas) < 2 <= self.evaluations(i):
                continue
            row = LambdaRow(
                solver=solver_name(student.solver),
                sigmas=student.run.sigmas.cpu().double().numpy(),
                evaluations=student.queries.per_step,
                weights=np.zeros(len(student.queries.sigmas)),
            )
            make_sigmas = self._recipe.make_sigmas
            plans.append(
                plan_refinement(
                    self._teacher,
                    row,
                    budget,
                    solver=_own(student),
                    make_sigmas=make_sigmas,
                    measured=True,
                    favourites=self._known_to(i),
                )
            )
        return max(plans, key=lambda plan: plan.evaluations)


def _share_of_many(schedules: int) -> float:
    """What each of so many rows gets of the budget that it would have alone: nearly all that refining gains comes early,
    and who wants many rows wants them today."""
    return 1 / math.sqrt(schedules)


def _in_the_end(contender: Contender) -> tuple[bool, int]:
    """Refined rows come last, in the schedules' order; the others stay as they are."""
    refined = contender.row.is_refined
    return refined, contender.schedule if refined else 0


def _own(student: GreedyStudent) -> Sampler | None:
    """A solver of the caller's own: no row can hold a function."""
    return None if isinstance(student.solver, str) else student.solver
