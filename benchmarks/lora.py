"""What a LoRA for a row's few timestamps gains, beside the row and SFD's own recipe.

Students: the refined row that ships, whose first step is free where that won the race; a row fitted as that one is, but
without such a step; plain Euler. LoRAs for them learn the end of their trajectory, or what SFD has, the state after every
step of Euler. All get the same evaluations, latents and teacher. One for all numbers of steps together gets as many
evaluations as the separate ones together. Without guidance the student has half of an evaluation's work, while its
teacher keeps its own. Ablations of rank and noises are runs with other options.

RMS and median distance to the converged solution at σ = 0 on test latents, Fréchet distance to the real digits, and what
it has cost.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import colour
import torch
from common import (
    Bench,
    arguments,
    evaluations_bar,
    fitted_rows,
    frechet,
    prepare,
    print_setting,
    print_table,
)
from refinement import LAMBDAS, row_of
from stock import HEATS, best_stock, combinations
from torch import Tensor

from dode_nodes import LambdaRow, LambdaTable, run_teacher
from dode_nodes.demo.catalogue import PICTURES, load_model
from dode_nodes.demo.colour.models import load_colour_model
from dode_nodes.demo.models import KINDS
from dode_nodes.fit.lora import END, STEP, LoraRecipe, LoraTraining
from dode_nodes.fit.lora_pipeline import TEACHER, TEACHER_STEPS, best_rows, teacher_schedule
from dode_nodes.fit.low_rank import LowRank
from dode_nodes.fit.quality import start_schedule
from dode_nodes.sampling.schedules import make_sigmas
from dode_nodes.tables.picture_grid import Block, PictureRow, picture_grid

BATCH = 4
NO_GUIDANCE = 1.0
_SHOWN = 8  # test latents


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


class Work:
    """What all methods share: a model, its rows, and the LoRAs' teacher.

    Args:
        steps: evaluations per picture, of all that is measured.
        noises: that the LoRAs are trained on, a quarter of them held out.
        budget: evaluations that training a LoRA for one of the steps may cost.
        rank: of the LoRAs.
    """

    def __init__(self, bench: Bench, steps: Sequence[int], noises: int, budget: int, rank: int) -> None:
        self.bench, self.steps, self.budget, self.rank = bench, list(steps), budget, rank
        self._table = LambdaTable.load(LAMBDAS / f"demo_{bench.model.name}.safetensors")
        self._together: dict[int, Trial] = {}
        fine = teacher_schedule(bench.model.make_sigmas, flow=bench.model.kind == "flow")
        schedules = [
            fine,
            *map(self._euler_schedule, steps),
        ]  # SFD's loss asks for the states of Euler's steps
        with evaluations_bar("teacher of the LoRAs") as tell:
            self.targets = run_teacher(bench.fit_latents(noises, seed=1), schedules, TEACHER, progress=tell)

    def row(self, n: int) -> LambdaRow:
        """That ships; of one evaluation none does, so it is fitted as those were."""
        return row_of(self._table, n, refined=True) if n > 1 else self._fitted(n, free_first=True)

    def euler(self, n: int) -> LambdaRow:
        """Without λ."""
        return LambdaRow("euler", self._euler_schedule(n).double().numpy(), (1,) * n, [0.0] * n)

    def all_paid(self, n: int) -> LambdaRow:
        """As the row, but every step costs an evaluation."""
        return self._fitted(n, free_first=False)

    def _fitted(self, n: int, *, free_first: bool) -> LambdaRow:
        latents = replace(
            self.bench.fit_latents(self._table.rows[0].settings["latents"]), free_first=free_first
        )
        with evaluations_bar(f"row, {n}") as tell:
            rows = fitted_rows(self.bench.model, latents, self.bench.schedule(n), progress=tell)
        (row,) = best_rows(rows, [n])
        return row

    def stock(self, n: int) -> Trial:
        """The best of all, chosen on the test latents in its favour."""
        begun = time.perf_counter()
        heats = colour.HEATS if self.bench.model.name == PICTURES else HEATS
        _, found, results = best_stock(self.bench, combinations(self.bench, n), heats)
        return Trial("best stock", results, str(found), 0, time.perf_counter() - begun)

    def alone(self, n: int) -> Trial:
        """The row, no LoRA."""
        row = self.row(n)
        spent = sum(row.report["evaluations"].values()) if row.is_refined else 0
        return Trial("row", self.bench.sample_row(row), row.label, spent, 0.0)

    def together(self, n: int) -> Trial:
        """The rows of all steps with one LoRA."""
        if not self._together:
            rows = [self.row(n) for n in self.steps]
            trials = self.trained("rows + one LoRA for all, loss at the end", rows)
            self._together = dict(zip(self.steps, trials, strict=True))
        return self._together[n]

    def trained(
        self, name: str, rows: Sequence[LambdaRow], loss: str = END, cfg: float | None = None
    ) -> list[Trial]:
        """Rows with one LoRA, on a network of its own; cfg: of the student, where it is not its teacher's."""
        begun, bench = time.perf_counter(), self.bench
        model = load_model(bench.model.name)
        denoiser = model.denoiser(bench.cfg if cfg is None else cfg)
        (group,) = self.targets.latents.groups
        latents = replace(self.targets.latents, groups=[replace(group, model=denoiser)])
        mean = sum(row.nfe for row in rows) / len(rows)
        recipe = LoraRecipe(
            int(len(rows) * self.budget / (3 * BATCH * mean)), BATCH, loss=loss, checkpointing=False
        )
        adapters = LowRank(model.network, self.rank)
        training = LoraTraining(replace(self.targets, latents=latents), rows, adapters, recipe)
        with evaluations_bar(name) as tell:
            best = training.run(tell)
        measured = replace(bench, test=replace(bench.test, model=denoiser))
        seconds = time.perf_counter() - begun
        held_out = zip(rows, training.errors_without, best.errors, strict=True)
        return [
            Trial(
                name, measured.sample_row(row),
                f"{row.label}; strength {best.strength:g}, held-out {alone:.4f} → {error:.4f}, "
                f"{recipe.iterations} batches",
                training.cost, seconds,
            )
            for row, alone, error in held_out
        ]  # fmt: skip

    def _euler_schedule(self, n: int) -> Tensor:
        """Karras' without the penultimate σ, for Euler's last step does nothing; the flow's as it is."""
        eps = self.bench.model.kind == "eps"
        name = start_schedule(flow=not eps)
        return make_sigmas(name, n, self.bench.model.noise_schedule, discard_penultimate=eps)


METHODS: dict[str, Callable[[Work, int], Trial]] = {
    "stock": Work.stock,
    "row": Work.alone,
    "euler-step": lambda work, n: work.trained("Euler + LoRA, SFD's loss", [work.euler(n)], STEP)[0],
    "euler-end": lambda work, n: work.trained("Euler + LoRA, loss at the end", [work.euler(n)])[0],
    "row-end": lambda work, n: work.trained("row + LoRA, loss at the end", [work.row(n)])[0],
    "paid-end": lambda work, n: work.trained("row without a free step + LoRA", [work.all_paid(n)])[0],
    "together": Work.together,
    "unguided": lambda work, n: work.trained(
        "row + LoRA, student without guidance", [work.row(n)], cfg=NO_GUIDANCE
    )[0],
}
"""Of a number of evaluations."""


def bench_of(name: str, cfg: float, latents: int) -> Bench:
    """The latents to measure on; of pictures with prompts that neither the table nor a LoRA was fitted on."""
    if name != PICTURES:
        return prepare(name, cfg, latents)
    model = load_colour_model("flow")
    return colour.prepare(model, cfg, latents)


def frechet_of(bench: Bench, results: Tensor) -> float | None:
    """To the real digits; None for other pictures: the features are a classifier's of digits."""
    return None if bench.model.name == PICTURES else frechet(results)


def draw(bench: Bench, trials: Sequence[tuple[int, Trial]]) -> Path:
    """The first test latents, one way below the other."""
    model, shown = bench.model, slice(_SHOWN)
    rows = [
        PictureRow(
            f"{steps} × {trial.name}",
            model.pictures(trial.results[shown]).numpy(),
            stock=trial.evaluations == 0,
        )
        for steps, trial in trials
    ]
    rows.append(PictureRow("converged", model.pictures(bench.converged[shown]).numpy(), heads_group=True))
    title = f"Same noise, same network ({model.name}), cfg {bench.cfg:g}"
    figure = picture_grid(rows, [Block(title, [""] * len(bench.converged[shown]))])
    out = Path(__file__).parent / "figures" / f"lora_{model.name}.png"
    figure.savefig(out)
    return out


def main() -> None:
    """Measure, print and draw."""
    torch.set_num_threads(1)
    options = arguments(
        __doc__, lists={"steps": (2, 3, 4)}, words={"methods": METHODS}, models=(*KINDS, PICTURES),
        test_latents=96, noises=256, budget=20_000, rank=8,
    )  # fmt: skip
    for name in options.models:
        bench = bench_of(name, options.cfg, options.test_latents)
        work = Work(bench, options.steps, options.noises, options.budget, options.rank)
        lines: list[Sequence[object]] = [
            ("", "converged", 0.0, 0.0, frechet_of(bench, bench.converged), "", "", "")
        ]
        trials = []
        for steps in options.steps:
            for method in options.methods:
                found = METHODS[method](work, steps)
                trials.append((steps, found))
                results = found.results
                lines.append((steps, found.name, bench.error(results), bench.median(results), frechet_of(bench, results),
                              found.evaluations, found.seconds, found.note))  # fmt: skip
                print(*lines[-1], sep=" | ", file=sys.stderr, flush=True)
        print_setting(bench)
        print(
            f"LoRAs: rank {options.rank}, {options.noises} noises, of which a quarter is held out, batches of {BATCH}; "
            f"their teacher: {TEACHER_STEPS} steps, {work.targets.teacher}, {work.targets.evaluations} evaluations. A "
            "backward pass counts as two evaluations."
        )
        print_table(
            ["evaluations", "student", "RMS", "median", "Fréchet", "evaluations to train", "seconds", ""],
            lines,
        )
        print(f"\nPictures: {draw(bench, trials)}")


if __name__ == "__main__":
    main()
