"""What a LoRA for a row's few timestamps gains, beside the row and SFD's own recipe.

A refined row, with its first step free where that won the race; the row with a LoRA that learns the end of its
trajectory; and plain Euler with a LoRA, by the loss at the end and by SFD's loss per step. All LoRAs get the same
evaluations, latents and teacher. RMS and median distance to the converged solution at σ = 0 on test latents, Fréchet
distance to the real digits, and what it has cost. stock: the best stock sampler × schedule × ending, chosen on the test
latents in its favour.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from common import Bench, arguments, evaluations_bar, frechet, prepare, print_setting, print_table
from stock import best_stock, combinations
from torch import Tensor

from dode_nodes import LambdaRow, Pipeline, Recipe, Targets, run_teacher
from dode_nodes.demo.models import load_demo_model
from dode_nodes.fit.lora import END, STEP, LoraRecipe, LoraTraining
from dode_nodes.fit.lora_pipeline import TEACHER, TEACHER_STEPS
from dode_nodes.fit.low_rank import LowRank
from dode_nodes.fit.quality import QUALITIES, start_schedule
from dode_nodes.sampling.schedules import make_sigmas

ROW_LATENTS = QUALITIES["best"].latents
BATCH = 4


@dataclass(frozen=True)
class Trial:
    """What was measured.

    Attributes:
        name: of the student and its LoRA.
        results: the test latents' ends.
        note: what it is or how it was trained.
        evaluations: spent on it, beside the LoRAs' teacher.
        seconds: the same.
    """

    name: str
    results: Tensor
    note: str
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Work:
    """What all methods share at a number of evaluations.

    Attributes:
        targets: the LoRAs' teacher's states.
        steps: evaluations per picture.
        budget: evaluations that training a LoRA may cost.
        rank: of the LoRAs.
        row: refined; the evaluations that it has cost are on it.
        row_seconds: that it has taken.
    """

    bench: Bench
    targets: Targets
    steps: int
    budget: int
    rank: int
    row: LambdaRow
    row_seconds: float

    @property
    def euler(self) -> LambdaRow:
        """Without λ."""
        sigmas = euler_schedule(self.bench, self.steps).double().numpy()
        return LambdaRow("euler", sigmas, (1,) * self.steps, [0.0] * self.steps)


def euler_schedule(bench: Bench, steps: int) -> Tensor:
    """Plain Euler's; Karras' without the penultimate σ, for its last step does nothing."""
    eps = bench.model.kind == "eps"
    name = start_schedule(flow=not eps)
    return make_sigmas(name, steps, bench.model.noise_schedule, discard_penultimate=eps)


def of_stock(work: Work) -> Trial:
    """The best of all."""
    begun = time.perf_counter()
    _, found, results = best_stock(work.bench, combinations(work.bench, work.steps))
    return Trial("best stock", results, str(found), 0, time.perf_counter() - begun)


def of_row(work: Work) -> Trial:
    """The row alone."""
    spent = sum(work.row.report["evaluations"].values())
    return Trial("row", work.bench.sample_row(work.row), work.row.label, spent, work.row_seconds)


def of_lora(name: str, loss: str, student: Callable[[Work], LambdaRow]) -> Callable[[Work], Trial]:
    """A row with a LoRA, on a network of its own."""

    def method(work: Work) -> Trial:
        begun, row, bench = time.perf_counter(), student(work), work.bench
        model = load_demo_model(bench.model.kind)
        denoiser = model.denoiser(bench.cfg)
        (group,) = work.targets.latents.groups
        latents = replace(work.targets.latents, groups=[replace(group, model=denoiser)])
        iterations = work.budget // (3 * BATCH * row.nfe)
        recipe = LoraRecipe(iterations, BATCH, loss=loss, checkpointing=False)
        training = LoraTraining(
            replace(work.targets, latents=latents), [row], LowRank(model.network, work.rank), recipe
        )
        with evaluations_bar(f"{name}, {work.steps}") as tell:
            best = training.run(tell)
        measured = replace(bench, test=replace(bench.test, model=denoiser))
        note = (
            f"strength {best.strength:g}, held-out {training.errors_without[0]:.4f} → {best.errors[0]:.4f}, "
            f"{iterations} batches"
        )
        return Trial(name, measured.sample_row(row), note, training.cost, time.perf_counter() - begun)

    return method


METHODS: dict[str, Callable[[Work], Trial]] = {
    "stock": of_stock,
    "row": of_row,
    "euler-step": of_lora("Euler + LoRA, SFD's loss per step", STEP, lambda work: work.euler),
    "euler-end": of_lora("Euler + LoRA, loss at the end", END, lambda work: work.euler),
    "row-end": of_lora("row + LoRA, loss at the end", END, lambda work: work.row),
}


def refined_row(bench: Bench, steps: int) -> tuple[LambdaRow, float]:
    """By the quality "best", and in how many seconds."""
    begun = time.perf_counter()
    recipe = Recipe(refine_budget=math.inf, make_sigmas=bench.model.make_sigmas)
    latents = bench.fit_latents(ROW_LATENTS)
    with evaluations_bar(f"row, {steps}") as tell:
        rows = Pipeline(latents, [bench.schedule(steps)], recipe).run(tell)
    return min(rows, key=LambdaRow.error_from), time.perf_counter() - begun


def lora_targets(bench: Bench, noises: int, steps: Sequence[int]) -> Targets:
    """Of all LoRAs; its states on the way are for the loss per step."""
    fine = make_sigmas(
        start_schedule(flow=bench.model.kind == "flow"), TEACHER_STEPS, bench.model.noise_schedule
    )
    schedules = [fine, *(euler_schedule(bench, n) for n in steps)]
    with evaluations_bar("teacher of the LoRAs") as tell:
        return run_teacher(bench.fit_latents(noises, seed=1), schedules, TEACHER, progress=tell)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    options = arguments(
        __doc__, lists={"steps": (2, 3, 4)}, test_latents=96, noises=256, budget=20_000, rank=8, skip_stock=0
    )
    for kind in options.models:
        bench = prepare(kind, options.cfg, options.test_latents)
        targets = lora_targets(bench, options.noises, options.steps)
        lines = []
        for steps in options.steps:
            work = Work(bench, targets, steps, options.budget, options.rank, *refined_row(bench, steps))
            for name, method in METHODS.items():
                if name == "stock" and options.skip_stock:
                    continue
                found = method(work)
                results = found.results
                lines.append((steps, found.name, bench.error(results), bench.median(results), frechet(results),
                              found.evaluations, found.seconds, found.note))  # fmt: skip
                print(*lines[-1], sep=" | ", file=sys.stderr, flush=True)
        print_setting(bench)
        print(
            f"LoRAs: rank {options.rank}, {options.noises} noises, of which a quarter is held out, batches of {BATCH}; "
            f"their teacher: {TEACHER_STEPS} steps, {targets.teacher}, {targets.evaluations} evaluations. A backward "
            f"pass counts as two evaluations. Rows: {ROW_LATENTS} latents, the quality best. Fréchet distance of the "
            f"converged latents: {frechet(bench.converged):.2f}."
        )
        print_table(
            ["evaluations", "student", "RMS", "median", "Fréchet", "evaluations to train", "seconds", ""],
            lines,
        )


if __name__ == "__main__":
    main()
