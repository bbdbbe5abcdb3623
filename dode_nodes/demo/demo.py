"""The demo's computation: distil solvers for an embedded model, refine the best, and set them beside stock solvers.

λ is fitted on one set of latents and checked on a quarter of it. What is compared comes from fresh latents
that nothing was fitted on: the distance to the converged solution from the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..distill import distill
from ..errors import DodeError
from ..groups import Evaluator, Group, Progress, held_out, in_order, micro_batches, root_mean_square
from ..refine import refine
from ..sample import sample_dode
from ..schedules import make_sigmas
from ..table import MAX_EVALUATIONS, LambdaRow, LambdaTable, end_error
from ..teacher import Targets, run_teacher
from .models import DemoModel
from .networks import CLASSES

STUDENTS = (("euler", "noise"), ("euler", "data"), ("dpmpp_2m", "data"), ("ipndm", "data"))
"""What is distilled: a solver, and what λ corrects."""
STUDENT_SCHEDULE = {"eps": "karras", "flow": "simple"}
"""The students' σ, by the model's kind."""
TEACHER = "dpmpp_2m"
SCALE = 10
"""The teacher's steps per student step."""

STOCK_SOLVERS = ("euler", "dpmpp_2m", "dpmpp_3m", "ipndm", "deis")
STOCK_SCHEDULES = {"eps": ("karras", "beta"), "flow": ("simple", "beta")}
"""What the stock solvers are tried on, with and without the penultimate σ."""

REFERENCE_SOLVER = "ipndm"
REFERENCE_STEPS = 200  # of the converged solution: at least so many, and REFERENCE_SCALE per student step
REFERENCE_SCALE = 20

_MICRO_BATCH = 20  # latents at a time: what fits a CPU's cache
# No two seeds share a latent, and none has one of those (0 to 9999) that this module's choices were made on.
_SEEDS_APART = 10_000

Tell = Callable[[str, int, int], None]
"""Told of progress: what is being done, evaluations (of one latent) behind, evaluations in all."""


@dataclass(frozen=True)
class Trial:
    """A sampler on a schedule.

    Attributes:
        solver: the sampler's name; for a refined row, that it began with.
        row: its λ, for a D-variant; None for the stock sampler.
        schedule: the name of its schedule.
        discard_penultimate: whether that schedule lacks its σ before 0.
        sigmas: the schedule, ``[N + 1]``.
    """

    solver: str
    schedule: str
    discard_penultimate: bool
    sigmas: Tensor = field(repr=False)
    row: LambdaRow | None = field(default=None, repr=False)

    @property
    def evaluations(self) -> int:
        """Of the network, for one picture: the demo's solvers need one a step."""
        return len(self.sigmas) - 1

    @property
    def label(self) -> str:
        """``euler``, ``D-euler (noise)``, or ``refined D-euler``."""
        if self.row is None:
            return self.solver
        return (
            f"refined D-{self.solver}" if self.row.is_refined else f"D-{self.solver} ({self.row.prediction})"
        )

    @property
    def on(self) -> str:
        """The schedule, in words; for a refined row, that its σ have moved away from."""
        begun = self.schedule + (" −penultimate" if self.discard_penultimate else "")
        return f"σ from {begun}" if self.row is not None and self.row.has_own_sigmas else begun

    @property
    def begun_on(self) -> tuple[str, bool]:
        """The schedule and its ending, to compare stock samplers on."""
        return self.schedule, self.discard_penultimate


@dataclass(frozen=True)
class Result:
    """What a trial led to on the fresh latents.

    Attributes:
        trial: what was run.
        latents: the last states, ``[B, 4, 8, 8]``.
        errors: each latent's RMS distance to the converged one, ``[B]``.
    """

    trial: Trial
    latents: Tensor
    errors: Tensor

    @property
    def error(self) -> float:
        """RMS distance to the converged solution over all latents."""
        return root_mean_square(self.errors)


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        kind: of the model, "eps" or "flow".
        budgets: evaluations per picture, ascending.
        cfg: scale of classifier-free guidance.
        seed: what the latents' own seeds follow from.
        latent_seeds: of the latents distilled on, the held-out ones last.
        fresh_seeds: of the latents compared on; the digits take turns, 0 to 9.
        table: a row per budget and student, refined ones last.
        results: of all trials.
        converged: the reference that errors are distances to.
        converged_error: its RMS distance to itself at half the steps.
    """

    kind: str
    budgets: tuple[int, ...]
    cfg: float
    seed: int
    latent_seeds: range
    fresh_seeds: range
    table: LambdaTable
    results: tuple[Result, ...]
    converged: Result
    converged_error: float

    def stock(self, budget: int) -> list[Result]:
        """The stock samplers, on all their schedules."""
        return [r for r in self.results if r.trial.row is None and r.trial.evaluations == budget]

    def distilled(self, budget: int) -> list[Result]:
        """The D-variants."""
        return [r for r in self.results if r.trial.row is not None and r.trial.evaluations == budget]

    def best_stock(self, budget: int) -> Result:
        """The stock sampler with the smallest error on the fresh latents themselves: hindsight."""
        return min(self.stock(budget), key=lambda result: result.error)

    def chosen(self, budget: int) -> Result:
        """The D-variant with the smallest error on the held-out latents, as a user would choose."""
        return min(self.distilled(budget), key=lambda result: end_error(result.trial.row))

    def undistilled(self, result: Result) -> Result:
        """The stock sampler of a D-variant, on the same schedule."""
        return self.stock_on_schedule_of(result, result.trial.solver)

    def stock_on_schedule_of(self, result: Result, solver: str) -> Result:
        """A stock sampler with as many evaluations, on the schedule that a trial is or has begun on."""
        same = (solver, result.trial.begun_on)
        stock = self.stock(result.trial.evaluations)
        return next(r for r in stock if (r.trial.solver, r.trial.begun_on) == same)


def run_demo(
    model: DemoModel,
    budgets: Sequence[int] = (5, 8, 10),
    *,
    cfg: float = 2.0,
    seed: int = 0,
    latents: int = 40,
    fresh_latents: int = 60,
    tell: Tell = lambda *_: None,
) -> Demo:
    """Distil, sample and measure.

    Args:
        model: the embedded model.
        budgets: network evaluations per picture.
        cfg: scale of classifier-free guidance.
        seed: of the noise.
        latents: to distil on, the held-out quarter included.
        fresh_latents: to compare on.
        tell: told of progress.

    Raises:
        DodeError: an argument is out of range, or the model's answers are not finite.
    """
    budgets = tuple(sorted(set(budgets)))
    check_settings(budgets, cfg, seed)
    latent_seeds = seeds_to_fit(seed, latents)
    fresh_seeds = range(latent_seeds.stop, latent_seeds.stop + fresh_latents)

    fitted, fresh = latents_group(model, cfg, latent_seeds), latents_group(model, cfg, fresh_seeds)
    stock = _stock(model, budgets)
    students, targets = _distil(model, fitted, budgets, {"cfg": cfg, "seed": seed}, tell)
    students += _refine(fitted, students, budgets, targets, tell)
    trials = [*students, *stock]
    steps = max(REFERENCE_STEPS, REFERENCE_SCALE * budgets[-1])
    schedule = STUDENT_SCHEDULE[model.kind]
    references = [_trial(model, REFERENCE_SOLVER, schedule, False, n) for n in (steps, steps // 2)]

    converged, half = _sample(fresh, references, "converged solution", tell)
    ends = _sample(fresh, trials, f"{len(trials)} samplers", tell)
    return Demo(
        kind=model.kind,
        budgets=budgets,
        cfg=cfg,
        seed=seed,
        latent_seeds=latent_seeds,
        fresh_seeds=fresh_seeds,
        table=LambdaTable([t.row for t in students], model={"name": "embedded digits", "kind": model.kind}),
        results=tuple(_result(trial, end, converged) for trial, end in zip(trials, ends, strict=True)),
        converged=_result(references[0], converged, converged),
        converged_error=root_mean_square(converged - half),
    )


def check_settings(steps: Sequence[int], cfg: float, seed: int) -> None:
    """That a distillation makes sense with them.

    Raises:
        DodeError: it does not.
    """
    if not steps or min(steps) < 2 or max(steps) > MAX_EVALUATIONS:
        raise DodeError(
            f"steps must lie between 2 and {MAX_EVALUATIONS}: λ acts from the second evaluation on, and is for few"
        )
    if not math.isfinite(cfg):
        raise DodeError(f"cfg must be a finite number, not {cfg}")
    if not 0 <= seed < 2**32:
        raise DodeError(f"the seed must lie between 0 and {2**32 - 1}, not {seed}")


def seeds_to_fit(seed: int, latents: int) -> range:
    """Each latent's own seed."""
    first = (seed + 1) * _SEEDS_APART
    return range(first, first + latents)


def latents_group(model: DemoModel, cfg: float, seeds: Sequence[int]) -> Group:
    """Noise for each seed; the digits take turns."""
    labels = torch.arange(len(seeds)) % CLASSES
    return Group(model.denoiser(cfg), model.noise(seeds), lambda indices: {"labels": labels[indices]})


def _trial(model: DemoModel, solver: str, schedule: str, discard_penultimate: bool, steps: int) -> Trial:
    """Of a stock sampler."""
    sigmas = make_sigmas(schedule, steps, model.noise_schedule, discard_penultimate=discard_penultimate)
    return Trial(solver, schedule, discard_penultimate, sigmas)


def _without_penultimate(model: DemoModel, steps: int) -> bool:
    """Whether the students' schedule leaves out its penultimate σ, so that the last evaluation does more.

    Measured on other latents: it pays on Karras' schedule at 5 to 10 steps, on a flow model's at 5 but not 8.
    """
    return model.kind == "eps" or steps < 7


def _stock(model: DemoModel, budgets: Sequence[int]) -> list[Trial]:
    """Every stock solver on every schedule and ending."""
    return [
        _trial(model, solver, name, discard, n)
        for n in budgets
        for solver in STOCK_SOLVERS
        for name in STOCK_SCHEDULES[model.kind]
        for discard in (False, True)
    ]


def _distil(
    model: DemoModel, group: Group, budgets: Sequence[int], settings: dict[str, float], tell: Tell
) -> tuple[list[Trial], Targets]:
    """Every student on every budget's schedule, from one run of the teacher."""
    students = [
        (_trial(model, solver, STUDENT_SCHEDULE[model.kind], _without_penultimate(model, n), n), prediction)
        for n in budgets
        for solver, prediction in STUDENTS
    ]
    targets = run_teacher(
        [group],
        None,
        [trial.sigmas for trial, _ in students[:: len(STUDENTS)]],
        solvers=sorted({solver for solver, _ in STUDENTS}),
        teacher=TEACHER,
        scale=SCALE,
        micro_batch=_MICRO_BATCH,
        progress=lambda p: tell("teacher", p.done, p.total),
    )
    latents = len(group.x) + len(held_out([group]))
    behind, ahead = 0, latents * sum(trial.evaluations for trial, _ in students)
    trials = []
    for trial, prediction in students:
        ahead -= latents * trial.evaluations

        def tell_of_all(p: Progress, behind: int = behind, ahead: int = ahead) -> None:
            tell(f"{len(students)} students", behind + p.done, behind + p.total + ahead)

        row = distill(
            [group],
            None,
            trial.sigmas,
            solver=trial.solver,
            prediction=prediction,
            targets=targets,
            micro_batch=_MICRO_BATCH,
            settings=settings | {"schedule": trial.on},
            progress=tell_of_all,
        )
        behind += sum(count for stage, count in row.report["evaluations"].items() if stage != "teacher")
        trials.append(replace(trial, row=row))
    return trials, targets


def _refine(
    group: Group, students: Sequence[Trial], budgets: Sequence[int], targets: Targets, tell: Tell
) -> list[Trial]:
    """Each budget's best student on held-out latents, fitted end to end; where that helps."""
    refined = []
    for n in budgets:
        trial = min((t for t in students if t.evaluations == n), key=lambda t: end_error(t.row))

        def tell_of_all(p: Progress, n: int = n) -> None:
            tell(f"refining, {n} steps", p.done, p.total)

        row = refine(
            [group], None, trial.row, targets=targets, micro_batch=_MICRO_BATCH, progress=tell_of_all
        )  # fmt: skip
        if row.is_refined:
            sigmas = torch.tensor(row.sigmas, dtype=trial.sigmas.dtype)
            refined.append(replace(trial, row=row, sigmas=sigmas))
    return refined


def _sample(group: Group, trials: Sequence[Trial], stage: str, tell: Tell) -> list[Tensor]:
    """Each trial's result, ``[B, 4, 8, 8]``."""
    batches = micro_batches([group], _MICRO_BATCH)
    evaluator = Evaluator(
        lambda p: tell(p.stage, p.done, p.total), total=len(group.x) * sum(t.evaluations for t in trials)
    )
    return [
        in_order(batches, [
            sample_dode(evaluator.on(batch, stage), batch.x, trial.sigmas, batch.extra_args(), disable=True,
                        row=trial.row, solver=trial.solver if trial.row is None else None)
            for batch in batches
        ])
        for trial in trials
    ]  # fmt: skip


def _result(trial: Trial, latents: Tensor, converged: Tensor) -> Result:
    return Result(trial, latents, (latents - converged).double().flatten(1).square().mean(1).sqrt())
