"""The teacher: the user's own sampler with many steps. It stops at every σ at which a student evaluates the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import DodeError
from ..sampling.denoiser import Denoiser
from ..sampling.probe import TeacherQueries, probe_student, probe_teacher, solver_name
from ..sampling.solvers import Sampler, resolve
from ..sigmas import at_least_float32, check_schedules, distinct, equal_sigma, is_flow
from ..tables.kept import Kept
from .evaluator import Evaluator
from .latents import Latents, MicroBatch, in_order, mean_squares
from .progress import Progress, Tell
from .runs import Run

STEPS = 30
_LEAST_SCALE = {False: 5, True: 8}
"""Of models without and with flow, if nobody says otherwise: what is fitted to such a DPM++ 2M ends as near to the
converged solution as what is fitted to the paper's C of 10 (docs/measurements.md)."""


@dataclass(frozen=True)
class Teacher:
    """Which sampler is followed, and how finely.

    Attributes:
        solver: a sampler that asks exactly the σ it is given.
        scale: its steps per student step (the paper's C). 0: as many as give the longest schedule ``STEPS`` of
            them, and 5 at least, of flow models 8.
        flow: measure steps in σ, not in log σ. None: where the schedule begins at σ ≤ 1.

    Raises:
        DodeError: the scale is no whole number of at least 0.
    """

    solver: str | Sampler = "dpmpp_2m"
    scale: int = 0
    flow: bool | None = None

    def __post_init__(self) -> None:
        if type(self.scale) is not int or self.scale < 0:
            raise DodeError(f"scale must be a whole number of at least 0, got {self.scale}")

    @property
    def name(self) -> str:
        """As a row keeps it."""
        return solver_name(self.solver)

    def __str__(self) -> str:
        return f"{self.name}, C = {self.scale}" if self.scale else self.name

    def over(self, schedules: Sequence[Tensor]) -> Teacher:
        """The same with what it left open decided: for students on these schedules."""
        flow = is_flow(schedules[0]) if self.flow is None else self.flow
        longest = max(len(sigmas) - 1 for sigmas in schedules)
        scale = self.scale or max(_LEAST_SCALE[flow], math.ceil(STEPS / longest))
        return replace(self, scale=scale, flow=flow)

    def grid(self, asked: Sequence[Sequence[float]], schedules: Sequence[Tensor]) -> Tensor:
        """The teacher's schedule: every σ that a student asks about, and interior points.

        A student's step gets ``scale`` parts, uniform in log σ (in σ for flow models and in an interval
        that ends at 0). Where students' σ and inner stages cut it into pieces, each piece gets its share,
        rounded up.

        Args:
            asked: for each student, the σ of its evaluations.
            schedules: whose steps are divided: the students' sigmas.

        Returns:
            Descending σ, float64.
        """
        chosen = self.over(schedules)
        linear = bool(chosen.flow)
        steps = [sigmas.tolist() for sigmas in schedules]
        stops = distinct(sigma for sigmas in (*asked, *steps) for sigma in sigmas)
        grid = stops[:1]
        for high, low in pairwise(stops):
            parts = max(math.ceil(chosen.scale * _share(high, low, s, linear) - 1e-4) for s in steps)
            grid += _between(high, low, max(parts, 1), linear or low == 0)
        return torch.tensor(grid, dtype=torch.float64)


def _share(high: float, low: float, schedule: Sequence[float], flow: bool) -> float:
    """The part of a step of ``schedule`` that the interval from ``high`` to ``low`` covers, 0 to 1."""
    for start, end in pairwise(schedule):
        begins_within = start > high or equal_sigma(start, high)
        ends_within = low > end or equal_sigma(low, end)
        if begins_within and ends_within:
            if flow or end == 0:
                return (high - low) / (start - end)
            return math.log(high / low) / math.log(start / end)
    return 0.0


def _between(high: float, low: float, parts: int, linear: bool) -> list[float]:
    """The ends of ``parts`` equal parts, the last one exactly ``low``.

    Where equal parts in σ come down to a ``low`` close to 0, the last one is a long step in log σ, over which a multistep
    teacher would extrapolate from a short one: it is taken in steps that halve σ at most.
    """
    if not linear:
        return [*(high * (low / high) ** (i / parts) for i in range(1, parts)), low]
    inner = [high + (low - high) * i / parts for i in range(1, parts)]
    last = inner[-1] if inner else high
    if low > 0 and (halvings := math.ceil(math.log2(last / low) - 1e-4)) > 1:
        return [*inner, *_between(last, low, halvings, False)]
    return [*inner, low]


@dataclass(frozen=True, eq=False)
class Targets:
    """A teacher's states at the σ of its students: all that a fit needs, with the latents they belong to.

    Attributes:
        latents: what is fitted on; the teacher ran ``latents.teaching``.
        teacher: what ran.
        states: σ → the states there, one tensor ``[B, C, *spatial]`` per group, on the CPU; 0 is the result.
        own_error: RMS difference of the result to that of the same teacher at half the steps, on the
            held-out latents: an upper estimate of the teacher's own error. None where C < 2.
        evaluations: network evaluations spent, one latent each.
        approach_cost: what ``approach`` takes of one latent, at most.
    """

    latents: Latents
    teacher: Teacher
    states: Mapping[float, Sequence[Tensor]] = field(repr=False)
    own_error: float | None
    evaluations: int
    approach_cost: int

    def at(self, sigma: float) -> Sequence[Tensor]:
        """The states at σ, one tensor per group.

        Raises:
            DodeError: the teacher did not stop there.
        """
        for stop, states in self.states.items():
            if equal_sigma(stop, sigma):
                return states
        raise DodeError(
            "run the teacher for this schedule and solver: "
            f"these targets have no state at σ = {sigma:.6g}, which the student needs"
        )

    def of(self, batch: MicroBatch, sigma: float) -> Tensor:
        """A micro-batch's states at σ, ``[m, C, *spatial]``; see ``at``."""
        return self.at(sigma)[batch.place][batch.indices]

    @property
    def ends(self) -> Sequence[Tensor]:
        """Where the latents end, one tensor per group."""
        return self.at(0.0)

    def check(self, sigmas: Sequence[float]) -> None:
        """That there are states at these σ.

        Raises:
            DodeError: there are not.
        """
        for sigma in sigmas:
            self.at(sigma)

    def approach(self, sigma: float) -> tuple[float, Run | None]:
        """How to come to a state that the teacher did not stop at: on from the last one above, as finely as it ran, with
        the model that it ran on.

        Returns:
            The σ of that state, and the run from there; None where the teacher did stop at ``sigma``.
        """
        stops = sorted(self.states, reverse=True)
        if (near := next((stop for stop in stops if equal_sigma(stop, sigma)), None)) is not None:
            return near, None
        above, below = next((high, low) for high, low in pairwise(stops) if high > sigma > low)
        step = torch.tensor([above, below], dtype=torch.float64)
        grid = self.teacher.grid([[above, sigma]], [step])
        dtype = torch.promote_types(self.latents.dtype, torch.float32)
        return above, Run(resolve(self.teacher.solver), grid[grid >= sigma].to(dtype))


@dataclass(frozen=True, eq=False)
class TeacherRun:
    """A teacher's run that can start: its solver and its students have passed the probe (``plan_teacher``).

    Attributes:
        kept: where its states are looked for first, and kept; None for nowhere.
    """

    latents: Latents
    teacher: Teacher
    passes: Sequence[_Pass]
    stops: Sequence[float]
    kept: Kept | None = None

    @property
    def cost(self) -> int:
        """In evaluations of one latent: a pass over all of them, and one at half the steps over those held out."""
        counts = [len(self.latents), len(self._checked)]
        return sum(each.queries.evaluations * n for each, n in zip(self.passes, counts, strict=False))

    @property
    def approach_cost(self) -> int:
        """What it takes of one latent to come to a σ within a step of a student, at most."""
        whole = self.passes[0]
        per_step = math.ceil(whole.queries.evaluations / (len(whole.run.sigmas) - 1))
        return self.teacher.scale * per_step

    @property
    def _checked(self) -> list[int]:
        return self.latents.held_out or [0]

    def __call__(self, progress: Progress | Tell | None = None) -> Targets:
        """Run it; see ``run_teacher``."""
        with Progress.of(progress, self.cost) as work:
            if (known := self._known()) is not None:
                return known
            targets = self._run(work)
        self._keep(targets)
        return targets

    def ends(self, only: Sequence[int], progress: Progress) -> Tensor:
        """Where the latents of these numbers end, in their order; without the states on the way, and without looking at
        what is kept."""
        batches = self.latents.teaching.batches(only)
        states = self.passes[0].states(batches, [0.0], Evaluator(progress))
        return in_order(batches, [each[0.0] for each in states])

    def ends_cost(self, latents: int) -> int:
        """Of ``ends``, in evaluations of one latent."""
        return self.passes[0].queries.evaluations * latents

    def _known(self) -> Targets | None:
        """What an earlier run has kept."""
        found = None if self.kept is None else self.kept.load()
        if found is None or found[1]["stops"] != list(self.stops):
            return None
        tensors, facts = found
        groups = range(len(self.latents.groups))
        states = {
            stop: [tensors[f"{i}.{place}"] for place in groups] for i, stop in enumerate(facts["stops"])
        }
        return Targets(
            self.latents, self.teacher, states, facts["own_error"], facts["evaluations"], self.approach_cost
        )

    def _keep(self, targets: Targets) -> None:
        if self.kept is None:
            return
        tensors = {
            f"{i}.{place}": state
            for i, states in enumerate(targets.states.values())
            for place, state in enumerate(states)
        }
        facts = {
            "stops": list(targets.states),
            "own_error": targets.own_error,
            "evaluations": targets.evaluations,
        }
        self.kept.save(tensors, facts)

    def _run(self, work: Progress) -> Targets:
        evaluator = Evaluator(work)
        batches = self.latents.teaching.batches()
        whole = self.passes[0].states(batches, self.stops, evaluator)
        states = {
            stop: self.latents.by_group(batches, [states[stop] for states in whole]) for stop in self.stops
        }
        targets = Targets(self.latents, self.teacher, states, None, 0, self.approach_cost)
        own_error = self._own_error(targets, evaluator)
        return replace(targets, own_error=own_error, evaluations=evaluator.spent())

    def _own_error(self, targets: Targets, evaluator: Evaluator) -> float | None:
        if len(self.passes) < 2:
            return None
        batches = self.latents.teaching.batches(self._checked)
        ends = self.passes[1].states(batches, [0.0], evaluator)
        squares = [
            mean_squares(end[0.0] - targets.of(batch, 0.0)) for batch, end in zip(batches, ends, strict=True)
        ]
        return float(in_order(batches, squares).mean().sqrt())


@dataclass(frozen=True, eq=False)
class _Pass:
    """A teacher's run over one grid, and where in it the states are found."""

    run: Run
    queries: TeacherQueries

    @classmethod
    def probed(cls, teacher: Sampler, grid: Tensor, model: Denoiser) -> _Pass:
        return cls(Run(teacher, grid), probe_teacher(teacher, grid, model=model))

    def states(
        self, batches: Sequence[MicroBatch], stops: Sequence[float], evaluator: Evaluator
    ) -> list[dict[float, Tensor]]:
        """The states at ``stops``, per micro-batch ``[m, C, *spatial]``."""
        stop_at = {
            start: stop
            for start, sigma in zip(self.queries.starts, self.run.sigmas[:-1].tolist(), strict=True)
            for stop in stops
            if equal_sigma(stop, sigma)
        }
        found = []
        for batch in batches:
            states, end = self.run.trajectory(evaluator.on(batch, "teacher"), batch, stop_at)
            found.append({stop_at[k]: state for k, state in states.items()} | {0.0: end})
        return found


def plan_teacher(
    latents: Latents,
    schedules: Sequence[Tensor] | Tensor,
    teacher: Teacher = Teacher(),  # frozen
    *,
    solvers: str | Sampler | Sequence[str | Sampler] = "euler",
    solver_options: Mapping[str, Any] | None = None,
    along: Sequence[Tensor] | None = None,
) -> TeacherRun:
    """What ``run_teacher`` would do, and what it would cost; raises what it would.

    Args:
        along: the schedules whose steps the teacher divides, from the students' first σ down to 0; None for the
            students' own. It stops at all that the students ask about, either way.
    """
    schedules = [schedules] if isinstance(schedules, Tensor) else list(schedules)
    students = [solvers] if isinstance(solvers, str) or callable(solvers) else list(solvers)
    along = schedules if along is None else along
    check_schedules([*schedules, *along])
    teacher = teacher.over(along)
    schedules, along = (
        [at_least_float32(sigmas.detach().cpu()) for sigmas in each] for each in (schedules, along)
    )

    lender = latents.lender
    asked = [
        probe_student(resolve(solver), sigmas, model=lender, options=solver_options).sigmas
        for solver in students
        for sigmas in schedules
    ]
    visited = [*asked, *(sigmas.tolist() for sigmas in schedules)]
    passes = []
    for scale in (teacher.scale, teacher.scale // 2):
        if scale:
            grid = replace(teacher, scale=scale).grid(visited, along).to(schedules[0].dtype)
            passes.append(_Pass.probed(resolve(teacher.solver), grid, latents.teaching.lender))
    stops = distinct([*(sigma for queries in asked for sigma in queries), 0.0])
    return TeacherRun(latents, teacher, passes, stops)


def run_teacher(
    latents: Latents,
    schedules: Sequence[Tensor] | Tensor,
    teacher: Teacher = Teacher(),  # frozen
    *,
    solvers: str | Sampler | Sequence[str | Sampler] = "euler",
    solver_options: Mapping[str, Any] | None = None,
    progress: Progress | Tell | None = None,
) -> Targets:
    """Run the teacher once, for several students.

    Args:
        latents: what to run it on.
        schedules: the students' sigmas, descending to 0; all begin at the same σ.
        teacher: what runs.
        solvers: the students' samplers: every one of them is served on every schedule.
        solver_options: keyword arguments of every student.
        progress: told after every evaluation; what it raises ends the run.

    Raises:
        IneligibleSampler: before any evaluation, for the teacher or a student.
        DodeError: invalid input, or a NaN from the model.
    """
    plan = plan_teacher(latents, schedules, teacher, solvers=solvers, solver_options=solver_options)
    return plan(progress)
