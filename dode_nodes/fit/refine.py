"""Refine a row end to end: fit all of the student's few numbers to the teacher's last state.

Greedy λ follows the teacher from step to step, but only the last latent is seen. So here all numbers are fitted
to it together: for a single-stage linear multistep solver its weights over the history of outputs,

    ô_k = Σ_j W_kj o_j,    x_{k+1} = x_k + (σ_{k+1} − σ_k) ô_k    (Kim et al. 2024, Eq. 8; o in noise space)

of which λ is the one-parameter case, and its interior σ; for other solvers λ. The held-out latents
decide which result is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial, reduce
from itertools import count
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import DodeError
from ..sampling.free_outputs import fitted_prior
from ..sampling.sample import solver_beside, solver_of
from ..sampling.solvers import Sampler
from ..tables.gate import SETTINGS, checked, finite
from ..tables.kept import Kept
from ..tables.provenance import PLAIN_SOLVER, ROW_GIVEN, HeldOutErrors, StockSetting
from ..tables.row import LambdaRow
from .done_jacobians import DoneJacobians
from .evaluator import Evaluator
from .family import in_bands, same_schedule, with_gaussian, with_start
from .held_out import with_later_starts
from .levenberg_marquardt import LeastSquaresProblem, Played, geometric_mean, levenberg_marquardt
from .progress import Progress, Tell
from .race import Entrant, Favourites, MakeSigmas, favourites_of, finalists, half, race, stock_among
from .scope import BANDS, WIDE_JACOBIANS, Scope
from .student import Student
from .teacher import Targets

_HARM = 1.1  # of the distance on latents outside of the fit, that is noise
_PAYS = 0.02  # of the distance, by which a wider family must be nearer to be kept


class Stage(NamedTuple):
    """A student that a refinement has tried.

    Attributes:
        name: what it was: one to begin with, or the one after a Jacobian.
        fitted_error, held_out_error: its RMS distance to the teacher at the end; NaN without latents.
        distance: the geometric mean over both; the choice is made by it, for a few latents cannot decide it.
        evaluations: of one latent each, spent on the refinement by then.
    """

    name: str
    fitted_error: float
    held_out_error: float
    distance: float
    evaluations: int


class Refinement:
    """Fits a row's numbers to the teacher's last state, by Levenberg–Marquardt without backpropagation.

    A row of a single-stage linear multistep solver (euler, dpmpp_2m, ipndm, …) becomes weights over the history of
    outputs on a schedule of its own, sampled with euler. The fit begins with the row itself, its plain solver, iPNDM-3
    or, where the host's schedules are known, the best of a race over solvers, schedules and endings, with the first
    step free or not (``race``). Then the family is widened where that pays: by weights per band of spatial frequency
    (``bands``) and a Gaussian denoiser (``free_outputs``), from the best with a first step that is free and the best
    without. Any other row keeps its solver and schedule, and its λ or weights are refined. Evaluations per picture stay
    as they are. By the geometric mean of its distances on all latents, ``best`` is no further from the teacher than the
    row that was given and its plain solver.

    It can be ended at any time, by an exception from ``progress`` or by leaving the loop over ``stage_by_stage``,
    and asked at any time.

    Args:
        targets: the teacher's states, with the latents. With one latent nothing is held out, and the row is
            marked as not checked.
        row: what to start from, as ``distill`` makes it.
        solver: the sampler itself, where the row was distilled on a callable.
        budget: evaluations that the fit may cost, as a multiple of ten for each of the row's on all latents; latents,
            Jacobians and what else is tried follow from it. Runs from later steps come on top. None for all latents and
            all that pays.
        make_sigmas: the host's schedules, for the race; None for no race.
        settings: facts to add to the row's.
        measured: whether the row has been measured on these very targets: what its plain solver does from later steps on
            is known then.
        favourites: see ``race.Favourites``.
        kept: where its Jacobians are kept, for another one of the same to go on after them; None for nowhere.

    Raises:
        IneligibleSampler: the row's solver cannot serve.
        DodeError: invalid input, or a budget that pays for nothing.

    Attributes:
        plan: what it may cost.
        stages: what it has tried so far.
        stock: the best stock setting that the race has found; None without a race.
        favourites: who they are after that race.
    """

    def __init__(
        self,
        targets: Targets,
        row: LambdaRow,
        *,
        solver: str | Sampler | None = None,
        budget: float | None = None,
        make_sigmas: MakeSigmas | None = None,
        settings: Mapping[str, Any] | None = None,
        measured: bool = False,
        favourites: Favourites | None = None,
        kept: Kept | None = None,
    ) -> None:
        self._targets = targets
        self._kept_jacobians = kept
        self._scope = Scope.of(
            row, solver_of(row, solver), make_sigmas, targets, measured=measured, favourites=favourites
        )
        self._of_plain = list(row.errors.later_stock) if measured and row.errors else None
        self._family = self._scope.family
        self._settings = dict(row.settings) | dict(checked(settings or {}, SETTINGS, "settings"))
        targets.check([float(row.sigmas[0]), 0.0])
        self.plan = self._scope.plan(budget)
        self._checked = bool(targets.latents.held_out)
        self._begin()

    def _begin(self) -> None:
        self.stages: list[Stage] = []
        self._kept: tuple[str, Student] = (ROW_GIVEN, self._family.starts[ROW_GIVEN])
        self._least = math.inf
        self._kept_unseen = self._most_unseen = math.inf
        self._nearest: dict[bool, tuple[float, Student]] = {}
        self._best_stock: StockSetting | None = None
        self._nearest_stock = math.inf
        self.stock: Entrant | None = None
        self.favourites: Favourites = {}
        self._finished: LambdaRow | None = None

    def run(self, progress: Progress | Tell | None = None) -> LambdaRow:
        """All of it: the best row, with the errors of its later starts.

        Args:
            progress: told after every evaluation; what it raises ends the fit, and ``best`` is as far as it came.

        Raises:
            DodeError: the model's answers are not finite, or no start is.
        """
        with Progress.of(progress, self.plan.evaluations) as work:
            fitting, checking = work.split(self.plan.fitting, self.plan.checking)
            for _ in self.stage_by_stage(fitting):
                pass
            row = self.best
            if self._kept[0] != ROW_GIVEN:
                solver = solver_beside(self._family.row, self._family.solver, row.solver)
                row = self._finished = with_later_starts(
                    self._targets, row, solver, checking, of_plain=self._of_plain
                )
        return row

    def stage_by_stage(self, progress: Progress | Tell | None = None) -> Iterator[Stage]:
        """The same, but for the later starts, one stage at a time: the starts, then a stage per Jacobian."""
        self._begin()
        with Progress.of(progress, self.plan.fitting) as work:
            self._evaluator = Evaluator(work)
            self._done = DoneJacobians(self._kept_jacobians)
            self._fit = self._on(self._targets.latents.fitted[: self.plan.fitted])
            self._check = self._on(self._targets.latents.held_out)
            for name, played in self._members():
                yield self._consider(name, played)
            self._finished = self._as_row(interrupted=False)

    def _on(self, numbers: Sequence[int]) -> LeastSquaresProblem:
        """The problem of running some of the latents."""
        return LeastSquaresProblem(self._targets, numbers, self._evaluator, "refining")

    def _members(self) -> Iterator[tuple[str, Played]]:
        """The students that are tried; what is yielded has been considered when this goes on."""
        begun: list[tuple[str, Played]] = []
        for name, student in self._starts():
            begun.append((name, self._fit.trial(student)))
            yield begun[-1]
        by_distance = {stage.name: stage.distance for stage in self.stages}
        begun.sort(key=lambda start: by_distance[start[0]])
        if not math.isfinite(begun[0][1].error):
            raise DodeError(
                f"{self._family.row.label}: this row and its plain solver both return NaN or infinite values on these "
                "latents. If the model runs in half precision, try fp32 or bf16"
            )
        begun = _on_different_schedules([start for start in begun if math.isfinite(start[1].error)])
        yield from self._descend(begun[: max(self.plan.leaders, 1)])
        if self.plan.kinds:
            yield from self._widen()

    def _starts(self) -> Iterator[tuple[str, Student]]:
        """Those of the family, and the race's best."""
        yield from self._family.starts.items()
        runners = self._scope.runners if self.plan.raced else []
        ranked = race(runners, self._fit.numbers, self._on)
        self.favourites = favourites_of(ranked)
        for entrant in ranked[: finalists(ranked)]:
            yield entrant.name, entrant.student
            self._note_stock(entrant)

    def _note_stock(self, entrant: Entrant) -> None:
        """The best stock setting, by the distance that its stage has shown."""
        stage = self.stages[-1]
        if entrant.is_stock and stage.distance < self._nearest_stock:
            self._nearest_stock, self.stock = stage.distance, entrant
            shown_on = len(self._targets.latents.held_out) or self.plan.fitted
            self._best_stock = entrant.setting(self._shown(stage), shown_on, stock_among(self._scope.runners))

    def _descend(self, leaders: Sequence[tuple[str, Played]]) -> Iterator[tuple[str, Played]]:
        """Jacobian by Jacobian. After each the better half of those that are left goes on: what is in front after the
        first need not be so after the second."""
        running: list[tuple[str, Iterator[Played]]] = []
        for name, start in leaders:
            parameters = self._family.parameters(start.student)
            descent = levenberg_marquardt(self._fit, start, parameters, self.plan.jacobians, self._done)
            running.append(("" if len(leaders) == 1 else f" of {name}", descent))
        for round_ in count(1):
            ran: list[tuple[float, int]] = []
            for i, (of, descent) in enumerate(running):
                if (played := next(descent, None)) is not None:
                    yield f"Jacobian {round_}{of}", played
                    ran.append((self.stages[-1].distance, i))
            if not ran:
                return
            running = [running[i] for _, i in sorted(ran)[: half(len(ran))]]

    def _parts(self) -> dict[str, Callable[[Student], Student]]:
        """By which the family can be widened here."""
        parts: dict[str, Callable[[Student], Student]] = {"with the start": with_start}
        ends = _picture_like(self._targets, self._fit.numbers)
        if ends is not None:
            parts["in bands"] = partial(in_bands, bands=BANDS)
            with suppress(DodeError):  # of numbers that no table holds
                parts["with a Gaussian denoiser"] = partial(with_gaussian, prior=fitted_prior(ends))
        return parts

    def _widen(self) -> Iterator[tuple[str, Played]]:
        """One part after the other, each from the best there is. Then all at once, from the best with the other kind of
        first step: one that is free is often behind without them, and ahead with them."""
        parts = self._parts()
        other = self._nearest.get(not self._kept[1].free.first)
        for what, widened in parts.items():
            student = widened(self._kept[1])
            if student is not self._kept[1]:  # else it has it already
                yield from self._descend_wide(what, student, WIDE_JACOBIANS)
        if self.plan.kinds > 1 and other is not None:
            student = reduce(lambda narrower, widened: widened(narrower), parts.values(), other[1])
            yield from self._descend_wide("the other kind of first step", student, self.plan.jacobians)

    def _descend_wide(self, what: str, student: Student, jacobians: int) -> Iterator[tuple[str, Played]]:
        start = self._fit.trial(student)
        if not math.isfinite(start.error):
            return
        descent = levenberg_marquardt(
            self._fit, start, self._family.parameters(student), jacobians, self._done
        )
        for i, played in enumerate(descent):
            yield f"{what}, Jacobian {i + 1}", played

    def _consider(self, name: str, played: Played) -> Stage:
        """Note a student, and keep it if it is nearer; a wider one only if that pays outside of the fit, too."""
        checked_on = self._check.trial(played.student)
        distances = np.concatenate([played.distances, checked_on.distances])
        spent = self._evaluator.spent()
        stage = Stage(name, played.error, checked_on.error, geometric_mean(distances), spent)
        self.stages.append(stage)
        kind, nearest = played.student.free.first, (stage.distance, played.student)
        self._nearest[kind] = min(self._nearest.get(kind, nearest), nearest, key=itemgetter(0))
        unseen = geometric_mean(checked_on.distances) if self._checked else 0.0
        if name in (ROW_GIVEN, PLAIN_SOLVER):
            self._most_unseen = min(self._most_unseen, _HARM * unseen)
        wider = _width(played.student) > _width(self._kept[1])
        needed, most = (1 - _PAYS, self._kept_unseen) if wider else (1.0, self._most_unseen)
        nearer = stage.distance < self._least * needed and unseen <= most
        if nearer and self._family.holds(name, played.student):
            self._kept, self._least, self._kept_unseen = (name, played.student), stage.distance, unseen
        return stage

    def _shown(self, stage: Stage) -> float:
        """The error to tell people: on latents outside of the fit, if there are any."""
        return stage.held_out_error if self._checked else stage.fitted_error

    @property
    def best(self) -> LambdaRow:
        """The best row so far; before the first stage, the row that was given.

        Until the last stage its report says that the refinement was interrupted.
        """
        return self._as_row(interrupted=True) if self._finished is None else self._finished

    def _as_row(self, *, interrupted: bool) -> LambdaRow:
        name, student = self._kept
        row = self._family.row_of(name, student)
        stages = [
            {
                "stage": stage.name,
                "fitted_error": finite(stage.fitted_error),
                "held_out_error": finite(stage.held_out_error),
                "distance": finite(stage.distance),
                "evaluations": stage.evaluations,
            }
            for stage in self.stages
        ]
        refined = {"kept": name, "stages": stages} | ({"interrupted": True} if interrupted else {})
        spent = dict(row.report.get("evaluations", {}))
        spent["refining"] = spent.get("refining", 0) + (self.stages[-1].evaluations if self.stages else 0)
        report = dict(row.report) | {"refined": refined, "evaluations": spent}
        row = replace(row, best_stock=self._best_stock or row.best_stock)
        if name == ROW_GIVEN:
            return replace(row, settings=self._settings, report=report)
        for of_the_row_given in ("after_steps", "shrunk_to", "lambda_standard_error", "undetermined"):
            report.pop(of_the_row_given, None)
        report |= {
            "fitted_latents": self.plan.fitted,
            "held_out_latents": len(self._targets.latents.held_out),
            "checked": self._checked,
            "teacher_error": self._targets.own_error,
        }
        return replace(row, settings=self._settings, report=report, errors=self._errors(row))

    def _errors(self, row: LambdaRow) -> HeldOutErrors | None:
        """At the end alone: on the way there a refined student need not be near the teacher."""
        if not self._checked:
            return None
        by_name = {stage.name: stage.held_out_error for stage in self.stages}
        stock = by_name.get(PLAIN_SOLVER, by_name[ROW_GIVEN])  # one of them where they are the same
        held = len(self._targets.latents.held_out)
        return HeldOutErrors.of_whole(held, row.steps, by_name[self._kept[0]], stock)


def refine(
    targets: Targets,
    row: LambdaRow,
    *,
    solver: str | Sampler | None = None,
    budget: float | None = None,
    make_sigmas: MakeSigmas | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | Tell | None = None,
) -> LambdaRow:
    """Fit a row's numbers to the teacher's last state; see ``Refinement``, whose best row this returns.

    Under ``torchrun``, once a process group is set up, every rank makes this call with the same latents and
    gets the same row; the micro-batches are shared out.
    """
    refinement = Refinement(
        targets, row, solver=solver, budget=budget, make_sigmas=make_sigmas, settings=settings
    )
    return refinement.run(progress)


def _on_different_schedules(starts: Sequence[tuple[str, Played]]) -> list[tuple[str, Played]]:
    """The same, best first, but last those on the schedule of a better one: their descents end alike, and would leave no
    place among the leaders for others."""
    first: list[tuple[str, Played]] = []
    again: list[tuple[str, Played]] = []
    for start in starts:
        taken = any(same_schedule(start[1].student.sigmas, other[1].student.sigmas) for other in first)
        (again if taken else first).append(start)
    return [*first, *again]


def _width(student: Student) -> int:
    """How many kinds of weights a member has."""
    return len(student.corrections) + student.free.columns if student.corrections.ndim == 3 else 1


def _picture_like(targets: Targets, numbers: Sequence[int]) -> torch.Tensor | None:
    """The fitted latents' ends, ``[B, C, *spatial]``; None where groups differ in shape, or are no pictures."""
    ends = targets.ends
    packed = ends[0].ndim == 3 and ends[0].shape[1] == 1  # several latents in a row: neighbours mean nothing
    if len({end.shape[1:] for end in ends}) > 1 or ends[0].ndim < 3 or packed:
        return None
    return torch.cat([end.double() for end in ends])[sorted(numbers)]
