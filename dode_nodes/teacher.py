"""The teacher: the user's own sampler over many steps, through every σ its students ask about."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import DodeError
from .groups import (
    Evaluator,
    ExtraArgs,
    Group,
    MicroBatch,
    Progress,
    as_groups,
    count_latents,
    held_out,
    in_order,
    micro_batches,
    root_mean_square,
)
from .probe import TeacherQueries, probe_student, probe_teacher, solver_name
from .runs import Run
from .sigmas import at_least_float32, check_schedules, distinct, equal_sigma, is_flow
from .solvers import Sampler, resolve


@dataclass(frozen=True, eq=False)
class Targets:
    """A teacher's states at the σ of its students.

    Attributes:
        teacher: the sampler's name.
        scale: its steps per student step, C.
        states: σ → the states of all latents there, ``[B, C, *spatial]``, on the CPU; 0 is the result.
        own_error: RMS difference of the result to that of the same teacher at half the steps, on the
            held-out latents: an upper estimate of the teacher's own error. None where C < 2.
        evaluations: network evaluations spent, one latent each.
        x: the latents' initial states, on the CPU: targets fit no other latents.
    """

    teacher: str
    scale: int
    states: dict[float, Tensor] = field(repr=False)
    own_error: float | None
    evaluations: int
    x: Tensor = field(repr=False)

    def at(self, sigma: float) -> Tensor:
        """The states at σ.

        Raises:
            DodeError: the teacher did not stop there.
        """
        for stop, states in self.states.items():
            if equal_sigma(stop, sigma):
                return states
        raise DodeError(
            f"these targets have no state at σ = {sigma:.6g}, which the student asks about: "
            "run the teacher for this schedule and solver"
        )

    def check(self, groups: Sequence[Group], sigmas: Sequence[float]) -> None:
        """That these are the states of these latents, and there are some at these σ.

        Raises:
            DodeError: they are not.
        """
        x = torch.cat([group.x.detach().cpu() for group in groups])
        if (x.shape, x.dtype) != (self.x.shape, self.x.dtype) or not torch.equal(x, self.x):
            raise DodeError(
                "these targets were made from other latents: run the teacher on the ones to distil on"
            )
        for sigma in sigmas:
            self.at(sigma)


def refined_grid(asked: Sequence[Sequence[float]], steps: Sequence[Tensor], scale: int, flow: bool) -> Tensor:
    """The teacher's schedule: every σ that a student asks about, and interior points.

    A student's step gets ``scale`` parts, uniform in log σ (in σ for flow models and in an interval
    that ends at 0). Where students' σ and inner stages cut it into pieces, each piece gets its share,
    rounded up.

    Args:
        asked: for each student, the σ of its evaluations.
        steps: for each student, its schedule.
        scale: parts per step, C.
        flow: whether σ itself is the measure.

    Returns:
        Descending σ, float64.
    """
    schedules = [sigmas.tolist() for sigmas in steps]
    stops = distinct(sigma for sigmas in (*asked, *schedules) for sigma in sigmas)
    grid = stops[:1]
    for high, low in pairwise(stops):
        parts = max(math.ceil(scale * _share(high, low, s, flow) - 1e-4) for s in schedules)
        grid += _between(high, low, max(parts, 1), flow or low == 0)
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
    """The ends of ``parts`` equal parts, the last one exactly ``low``."""
    if linear:
        inner = [high + (low - high) * i / parts for i in range(1, parts)]
    else:
        inner = [high * (low / high) ** (i / parts) for i in range(1, parts)]
    return [*inner, low]


def run_teacher(
    model: Denoiser | Sequence[Group],
    x: Tensor | None,
    schedules: Sequence[Tensor] | Tensor,
    *,
    solvers: str | Sampler | Sequence[str | Sampler] = "euler",
    solver_options: dict[str, Any] | None = None,
    teacher: str | Sampler = "dpmpp_2m",
    scale: int = 10,
    micro_batch: int | None = None,
    extra_args: ExtraArgs = None,
    flow: bool | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Targets:
    """Run the teacher once, for several students.

    Args:
        model: the denoiser, or a list of ``Group``s (then x and extra_args are None).
        x: initial states at sigmas[0], ``[B, C, *spatial]``, any float dtype and device.
        schedules: the students' sigmas, descending to 0; all begin at the same σ.
        solvers: the students' samplers: every one of them is served on every schedule.
        solver_options: keyword arguments of every student.
        teacher: a sampler that asks exactly the σ it is given.
        scale: the teacher's steps per student step, C.
        micro_batch: how many latents to evaluate at a time; None for a group at a time.
        flow: measure steps in σ, not in log σ. None: where the schedule begins at σ ≤ 1.
        progress: told after every evaluation; what it raises ends the run.

    Raises:
        IneligibleSampler: before any evaluation, for the teacher or a student.
        DodeError: invalid input, or a NaN from the model.
    """
    groups = as_groups(model, x, extra_args)
    passes, asked = _passes(groups, schedules, solvers, solver_options, teacher, scale, flow)
    check = held_out(groups) or [0]
    evaluator = Evaluator(progress, total=_cost(passes, groups))
    stops = distinct([*asked, 0.0])
    states = passes[0].states(micro_batches(groups, micro_batch), stops, evaluator)
    own_error = None
    for half in passes[1:]:
        end = half.states(micro_batches(groups, micro_batch, only=check), [0.0], evaluator)[0.0]
        own_error = root_mean_square(end - states[0.0][check])
    return Targets(
        teacher=solver_name(teacher),
        scale=scale,
        states=states,
        own_error=own_error,
        evaluations=evaluator.spent(),
        x=torch.cat([group.x.detach().cpu() for group in groups]),
    )


def teacher_evaluations(
    groups: Sequence[Group],
    schedules: Sequence[Tensor] | Tensor,
    *,
    solvers: str | Sampler | Sequence[str | Sampler] = "euler",
    solver_options: dict[str, Any] | None = None,
    teacher: str | Sampler = "dpmpp_2m",
    scale: int = 10,
    flow: bool | None = None,
) -> int:
    """What ``run_teacher`` would cost, in evaluations of one latent; raises what it would."""
    return _cost(_passes(groups, schedules, solvers, solver_options, teacher, scale, flow)[0], groups)


def _passes(
    groups: Sequence[Group],
    schedules: Sequence[Tensor] | Tensor,
    solvers: str | Sampler | Sequence[str | Sampler],
    solver_options: dict[str, Any] | None,
    teacher: str | Sampler,
    scale: int,
    flow: bool | None,
) -> tuple[list[_Pass], list[float]]:
    """The teacher's run, one at half its steps if there are that many, and the σ that the students ask."""
    schedules = [schedules] if isinstance(schedules, Tensor) else list(schedules)
    solvers = [solvers] if isinstance(solvers, str) or callable(solvers) else list(solvers)
    check_schedules(schedules)
    if not isinstance(scale, int) or scale < 1:
        raise DodeError(f"scale must be a whole number of at least 1, got {scale}")
    flow = is_flow(schedules[0]) if flow is None else flow
    schedules = [at_least_float32(sigmas.detach().cpu()) for sigmas in schedules]

    lender = groups[0].model
    asked = [
        probe_student(resolve(solver), sigmas, model=lender, options=solver_options).sigmas
        for solver in solvers
        for sigmas in schedules
    ]
    passes = []
    for parts in (scale, scale // 2):
        if parts:
            grid = refined_grid(asked, schedules, parts, flow).to(schedules[0].dtype)
            passes.append(_Pass.probed(resolve(teacher), grid, lender))
    return passes, [sigma for queries in asked for sigma in queries]


def _cost(passes: Sequence[_Pass], groups: Sequence[Group]) -> int:
    """The first is run on all latents, the other on those held out."""
    latents = [count_latents(groups), len(held_out(groups)) or 1]
    return sum(one.queries.evaluations * count for one, count in zip(passes, latents, strict=False))


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
    ) -> dict[float, Tensor]:
        """The states at ``stops``, latents in their order."""
        parts = [self._states_of(batch, stops, evaluator) for batch in batches]
        return {stop: in_order(batches, [part[stop] for part in parts]) for stop in stops}

    def _states_of(
        self, batch: MicroBatch, stops: Sequence[float], evaluator: Evaluator
    ) -> dict[float, Tensor]:
        stop_at = {
            start: stop
            for start, sigma in zip(self.queries.starts, self.run.sigmas[:-1].tolist(), strict=True)
            for stop in stops
            if equal_sigma(stop, sigma)
        }
        states, end = self.run.trajectory(evaluator.on(batch, "teacher"), batch, stop_at)
        return {stop_at[k]: state for k, state in states.items()} | {0.0: end}
