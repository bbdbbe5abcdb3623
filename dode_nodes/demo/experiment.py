"""The demo's computation: distil solvers for an embedded model, refine the best, and compare them with stock
solvers.

λ is fitted on one set of latents and checked on a quarter of it. The comparison uses fresh latents that were not
used for the fit. It measures the distance to the converged solution from the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice

import torch
from torch import Tensor

from ..errors import DodeError
from ..fit.evaluator import Evaluator
from ..fit.latents import Group, Latents, in_order, mean_squares, root_mean_square
from ..fit.pipeline import Pipeline
from ..fit.progress import Progress, Tell
from ..fit.quality import start_schedule
from ..fit.recipe import Recipe
from ..fit.teacher import Teacher
from ..sampling.sample import sample_dode
from ..sampling.schedules import make_sigmas
from ..tables.row import MAX_EVALUATIONS, LambdaRow
from ..tables.table import LambdaTable
from .catalogue import PICTURES
from .models import DemoModel

STUDENTS = ("euler", "dpmpp_2m", "ipndm")
"""What is distilled; what λ corrects, the held-out latents decide."""
TEACHER = Teacher("dpmpp_2m")
REFINE_BUDGET = 8.0
"""For weights and σ on all latents. With all by which the family can be widened it would take two and a half times as
long."""


@dataclass(frozen=True)
class Usual:
    """What a demo is of a model, if nobody says otherwise.

    Attributes:
        budgets: evaluations per picture.
        cfg: scale of classifier-free guidance.
        latents: to distil on, the held-out quarter included.
        fresh_latents: to compare on.
        students: what is distilled.
        refine_budget: see ``Recipe``.
    """

    budgets: tuple[int, ...] = (5, 8, 10)
    cfg: float = 2.0
    latents: int = 40
    fresh_latents: int = 60
    students: tuple[str, ...] = STUDENTS
    refine_budget: float = REFINE_BUDGET


DIGITS = Usual()
USUAL = {PICTURES: Usual((4,), 3.0, latents=20, fresh_latents=20, students=("euler",))}
"""Of models that are not digits. An evaluation of landscapes takes eight times as long."""

STOCK_SOLVERS = ("euler", "dpmpp_2m", "dpmpp_3m", "ipndm", "deis")
STOCK_SCHEDULES = {"eps": ("karras", "beta"), "flow": ("simple", "beta")}
"""What the stock solvers are tried on, with and without the penultimate σ."""

REFERENCE_SOLVER = "ipndm"
REFERENCE_STEPS = 200  # of the converged solution: at least so many, and REFERENCE_SCALE per student step
REFERENCE_SCALE = 20

_MICRO_BATCH = 20  # latents at a time: what fits a CPU's cache
# No two seeds share a latent, and none has one of those (0 to 9999) that this module's choices were made on.
_SEEDS_APART = 10_000


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
        latents: the last states, ``[B, C, H, W]``.
        errors: each latent's RMS distance to the converged one, ``[B]``.
    """

    trial: Trial
    latents: Tensor
    errors: Tensor

    @property
    def error(self) -> float:
        """RMS distance to the converged solution over all latents."""
        return float(self.errors.square().mean().sqrt())


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        model: the embedded model.
        budgets: evaluations per picture, ascending.
        cfg: scale of classifier-free guidance.
        seed: what the latents' own seeds follow from.
        latent_seeds: of the latents distilled on, the held-out ones last.
        fresh_seeds: of the latents compared on; the model's subjects take turns.
        table: a row per budget and student, refined ones last.
        results: of all trials.
        converged: the reference that errors are distances to.
        converged_error: its RMS distance to itself at half the steps.
    """

    model: DemoModel
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
        return min(self.distilled(budget), key=_held_out_error)

    def undistilled(self, result: Result) -> Result:
        """The stock sampler of a D-variant, on the same schedule."""
        return self.stock_on_schedule_of(result, result.trial.solver)

    def stock_on_schedule_of(self, result: Result, solver: str) -> Result:
        """A stock sampler with as many evaluations, on the schedule that a trial is or has begun on."""
        same = (solver, result.trial.begun_on)
        stock = self.stock(result.trial.evaluations)
        return next(r for r in stock if (r.trial.solver, r.trial.begun_on) == same)


def _held_out_error(result: Result) -> float:
    return math.inf if result.trial.row is None else result.trial.row.error_from()


def run_demo(
    model: DemoModel,
    budgets: Sequence[int] | None = None,
    *,
    cfg: float | None = None,
    seed: int = 0,
    latents: int | None = None,
    fresh_latents: int | None = None,
    progress: Tell | None = None,
) -> Demo:
    """Distil, sample and measure.

    Args:
        model: the embedded model.
        budgets, cfg, latents, fresh_latents: see ``Usual``; None for what is usual of the model.
        seed: of the noise.
        progress: told after every evaluation.

    Raises:
        DodeError: an argument is out of range, or the model's answers are not finite.
    """
    usual = usual_of(model.name)
    budgets, cfg = settings_of(model, budgets, cfg, seed)
    latent_seeds = seeds_to_fit(seed, latents or usual.latents)
    fresh_seeds = range(latent_seeds.stop, latent_seeds.stop + (fresh_latents or usual.fresh_latents))
    fresh = demo_latents(model, cfg, fresh_seeds, _MICRO_BATCH)

    name = start_schedule(flow=model.kind == "flow")
    schedules = [_trial(model, "euler", name, _without_penultimate(model, n), n) for n in budgets]
    recipe = Recipe(
        usual.students,
        teacher=TEACHER,
        refine_budget=usual.refine_budget,
        settings={"cfg": cfg, "seed": seed},
    )
    pipeline = Pipeline(
        demo_latents(model, cfg, latent_seeds, _MICRO_BATCH), [trial.sigmas for trial in schedules], recipe
    )
    stock = _stock(model, budgets)
    steps = max(REFERENCE_STEPS, REFERENCE_SCALE * budgets[-1])
    references = [_trial(model, REFERENCE_SOLVER, name, False, n) for n in (steps, steps // 2)]

    to_sample = [*references, *stock, *schedules * (len(usual.students) + 1)]  # those, and a refined row each
    sampling = len(fresh_seeds) * sum(trial.evaluations for trial in to_sample)
    with Progress(pipeline.cost.total + sampling, progress) as work:
        fitting, measuring = work.split(pipeline.cost.total, sampling)
        rows = pipeline.run(fitting)
        with measuring:
            evaluator = Evaluator(measuring)
            converged, half = _sample(fresh, references, "converged solution", evaluator)
            distilled = [_of_row(schedules, row) for row in rows]
            trials = [*distilled, *stock]
            ends = _sample(fresh, trials, f"{len(trials)} samplers", evaluator)
    return Demo(
        model=model,
        budgets=budgets,
        cfg=cfg,
        seed=seed,
        latent_seeds=latent_seeds,
        fresh_seeds=fresh_seeds,
        table=LambdaTable(rows, model=model.facts),
        results=tuple(_result(trial, end, converged) for trial, end in zip(trials, ends, strict=True)),
        converged=_result(references[0], converged, converged),
        converged_error=root_mean_square(converged - half),
    )


def settings_of(
    model: DemoModel, budgets: Sequence[int] | None, cfg: float | None, seed: int
) -> tuple[tuple[int, ...], float]:
    """The budgets, ascending, and cfg of a demo; None stands for what is usual.

    Raises:
        DodeError: as ``check_settings``.
    """
    usual = usual_of(model.name)
    budgets = tuple(sorted(set(usual.budgets if budgets is None else budgets)))
    cfg = usual.cfg if cfg is None else cfg
    check_settings(budgets, cfg, seed)
    return budgets, cfg


def usual_of(name: str) -> Usual:
    """What the demo of a model of this name is."""
    return USUAL.get(name, DIGITS)


def check_settings(steps: Sequence[int], cfg: float, seed: int) -> None:
    """That a distillation makes sense with them.

    Raises:
        DodeError: it does not.
    """
    if not steps or min(steps) < 1 or max(steps) > MAX_EVALUATIONS:
        raise DodeError(f"steps must be between 1 and {MAX_EVALUATIONS}")
    if not 0 <= cfg < math.inf:
        raise DodeError(f"cfg must be a number of at least 0, not {cfg}")
    if not 0 <= seed < 2**32:
        raise DodeError(f"the seed must be between 0 and {2**32 - 1}, not {seed}")


def seeds_to_fit(seed: int, latents: int) -> range:
    """Each latent's own seed."""
    first = (seed + 1) * _SEEDS_APART
    return range(first, first + latents)


def demo_latents(
    model: DemoModel,
    cfg: float,
    seeds: Sequence[int],
    micro_batch: int | None = None,
    subjects: Sequence[str] | None = None,
) -> Latents:
    """Noise for each seed; the subjects, by default the model's, take turns.

    Raises:
        DodeError: a subject is none that the model knows.
    """
    labels = model.labels(in_turns(subjects or model.subjects, len(seeds)))
    group = Group(model.denoiser(cfg), model.noise(seeds), lambda indices: {"labels": labels[indices]})
    return Latents([group], micro_batch)


def in_turns(subjects: Sequence[str], count: int) -> list[str]:
    """What so many latents are asked for."""
    return list(islice(cycle(subjects), count))


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


def _of_row(schedules: Sequence[Trial], row: LambdaRow) -> Trial:
    """A trial of a row, on the schedule that it has or began on."""
    plain = row.plain
    begun = next(trial for trial in schedules if trial.evaluations == row.steps)
    sigmas = torch.tensor(row.sigmas, dtype=begun.sigmas.dtype)
    return replace(begun, solver=plain.solver, sigmas=sigmas, row=row)


def _sample(latents: Latents, trials: Sequence[Trial], stage: str, evaluator: Evaluator) -> list[Tensor]:
    """Each trial's result, ``[B, C, H, W]``."""
    batches = latents.batches()
    return [
        in_order(batches, [
            sample_dode(evaluator.on(batch, stage), batch.x, trial.sigmas, batch.extra_args(), disable=True,
                        row=trial.row, solver=trial.solver if trial.row is None else None)
            for batch in batches
        ])
        for trial in trials
    ]  # fmt: skip


def _result(trial: Trial, latents: Tensor, converged: Tensor) -> Result:
    return Result(trial, latents, mean_squares(latents - converged).sqrt())
