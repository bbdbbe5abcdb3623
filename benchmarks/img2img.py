"""Runs that begin in the middle of a row: img2img at three denoises, and a hires fix.

The pictures are the converged test latents, with new noise at the σ where the run begins: under their own prompt,
under another digit's, and enlarged. A run of a row's last steps is compared with stock samplers from the same state
with as many evaluations: the row's own plain solver and the best stock sampler at home, over the last steps of the
plain schedule, stretched to begin where the row does. Errors are distances to the converged solution from that state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from common import (
    FIT_SEED,
    TEST_SEED,
    Bench,
    arguments,
    command,
    converged,
    evaluations_bar,
    prepare,
    print_table,
    sample_group,
)
from stock import samplers
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm
from transfer import STOCK

from dode_nodes import Group, LambdaRow, LambdaTable, Pipeline, Progress, Recipe, Targets
from dode_nodes.demo.experiment import TEACHER
from dode_nodes.fit.held_out import later_starts_cost, with_later_starts
from dode_nodes.fit.latents import mean_squares
from dode_nodes.fit.quality import start_schedule
from dode_nodes.sampling.schedules import make_sigmas
from dode_nodes.sampling.solvers import resolve
from dode_nodes.tables.choice import Part, part_for_steps, steps_of
from dode_nodes.tables.provenance import HeldOutErrors

NOISE_SEED = TEST_SEED + 500_000
DENOISE = (0.3, 0.5, 0.7)
HALF = (0.5,)
REFINED_FROM = "beta"


@dataclass(frozen=True)
class Task:
    """Pictures to begin with.

    Attributes:
        latents: the pictures, ``[B, C, H, W]``.
        labels: their prompts.
        denoise: the settings to measure.
    """

    name: str
    latents: Tensor
    labels: Tensor
    denoise: Sequence[float] = DENOISE

    def begun_at(self, bench: Bench, sigma: float) -> Group:
        """The pictures with noise, at σ."""
        noise = torch.stack([
            torch.randn(self.latents.shape[1:], generator=torch.Generator().manual_seed(NOISE_SEED + i))
            for i in range(len(self.latents))
        ])  # fmt: skip
        kept = 1 - sigma if bench.model.kind == "flow" else 1.0
        x = kept * self.latents + sigma * noise
        return Group(bench.test.model, x, lambda indices: {"labels": self.labels[indices]})


def tasks(bench: Bench) -> list[Task]:
    """img2img with a prompt that fits and one that does not; two sizes of a hires fix."""
    pictures, labels = bench.converged, bench.test.extra_args(torch.arange(len(bench.converged)))["labels"]
    larger = [
        Task(f"hires fix, 8×8 to {side}×{side}", interpolate(pictures, size=(side, side), mode="nearest-exact"),
             labels, HALF)
        for side in (12, 16)
    ]  # fmt: skip
    return [
        Task("img2img, the picture's own prompt", pictures, labels),
        Task("img2img, another digit's prompt", pictures, (labels + 1) % 10, HALF),
        *larger,
    ]


@dataclass(frozen=True)
class Fitted:
    """A table, and its plain rows with their held-out errors from every start, by steps."""

    name: str
    table: LambdaTable
    plain: dict[int, LambdaRow]


def fitted(bench: Bench, schedule: str, steps: Sequence[int], latents: int, *, refined: bool) -> Fitted:
    """A row for each number of steps, and its refinement."""
    schedules = [make_sigmas(schedule, n, bench.model.noise_schedule) for n in steps]
    recipe = Recipe(teacher=TEACHER, refine_budget=math.inf if refined else 0.0)
    pipeline = Pipeline(bench.fit_latents(latents), schedules, recipe)
    with evaluations_bar(f"{bench.model.kind}: fitting on {schedule}") as tell:
        rows = pipeline.run(tell)
    plain = {row.paid_steps: _plain(pipeline.targets, row) for row in rows if not row.is_refined}
    name = f"{schedule}, greedy and refined" if refined else f"{schedule}, greedy"
    return Fitted(name, LambdaTable(rows), plain)


def _plain(targets: Targets, row: LambdaRow) -> LambdaRow:
    """The row's plain solver, measured as a row is."""
    held_out = targets.latents.held_out
    plain = replace(
        row.plain, errors=HeldOutErrors.of_whole(len(held_out), row.steps, row.errors.stock, None)
    )
    work = Progress(later_starts_cost(targets.latents, plain.evaluations))
    return with_later_starts(targets, plain, resolve(plain.solver), work)


def stock_tail(plain: LambdaRow, part: Part) -> Tensor:
    """The last steps of the plain schedule, as many as the part has, stretched to begin where it does."""
    tail = torch.tensor(plain.sigmas[-1 - part.steps :], dtype=torch.float32)
    return tail * (part.sigmas[0] / tail[0])


@dataclass(frozen=True)
class Measured:
    """Distances to the converged solution from one state, latent by latent, mean squares.

    Attributes:
        own: of the converged solution at half the steps, RMS.
    """

    part: Part
    stock: Tensor
    best: Tensor
    row: Tensor
    own: float

    @property
    def gain(self) -> float:
        """The row's RMS as a fraction of its stock solver's."""
        return rms(self.row) / rms(self.stock)

    def cells(self) -> list[object]:
        """For a table."""
        row, stock = _spread(self.row), _spread(self.stock)
        return [
            f"{float(self.part.sigmas[0]):.3g}",
            self.part.steps,
            stock,
            _spread(self.best),
            row,
            self.gain,
            self.own,
        ]


def rms(squares: Tensor) -> float:
    """Over all latents."""
    return float(squares.mean().sqrt())


def _spread(squares: Tensor) -> str:
    return f"{rms(squares):.4f} / {float(squares.sqrt().median()):.4f}"


def measured(bench: Bench, task: Task, plain: LambdaRow, row: LambdaRow, steps: int) -> Measured:
    """Run the last steps of a row, and stock samplers beside it."""
    part = Part(row, row.steps - steps)
    group = task.begun_at(bench, float(part.sigmas[0]))
    end, own = converged(bench.model, group, float(part.sigmas[0]))
    tail = stock_tail(plain, part)

    def distance(sigmas: Tensor, solver: object, row: LambdaRow | None = None) -> Tensor:
        return mean_squares(sample_group(group, sigmas, solver, row) - end)

    best = samplers(bench.model.kind)[STOCK[bench.model.kind]]
    return Measured(
        part, distance(tail, plain.solver), distance(tail, best), distance(part.sigmas, None, part.row), own
    )


def lines(
    bench: Bench, task: Task, tables: Sequence[Fitted]
) -> tuple[list[list[object]], list[list[object]]]:
    """A line per row and denoise; and a line per choice that KSampler (D-ODE) makes."""
    rows: list[list[object]] = []
    choices: list[list[object]] = []
    for each, plain, denoise in tqdm(list(_settings(task, tables)), desc=task.name):
        n = plain.steps
        run = steps_of(n, denoise)
        found = {
            row.sha256: measured(bench, task, plain, row, run)
            for row in each.table.rows
            if row.paid_steps == n
        }
        rows += [
            [
                n,
                denoise,
                f"{each.name.split(',')[0]}, {'refined' if m.part.row.is_refined else 'greedy'}",
                *m.cells(),
            ]
            for m in found.values()
        ]
        taken = part_for_steps(each.table, n, denoise)
        start = n - run
        stands = plain.error_from(start) < taken.row.error_from(taken.start)
        gain = found[taken.row.sha256].gain
        best = min(1.0, *(m.gain for m in found.values()))
        kind = "refined" if taken.row.is_refined else "greedy"
        choices.append(
            [n, denoise, each.name, kind, gain, "stock" if stands else kind, 1.0 if stands else gain, best]
        )
    return rows, choices


def _settings(task: Task, tables: Sequence[Fitted]) -> Iterator[tuple[Fitted, LambdaRow, float]]:
    for each in tables:
        for plain in each.plain.values():
            for denoise in task.denoise:
                yield each, plain, denoise


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, lists={"steps": (5, 6, 8, 10)}, test_latents=32, fit_latents=16)
    for kind in options.models:
        bench = prepare(kind, options.cfg, options.test_latents)
        tables = [
            fitted(
                bench, start_schedule(flow=kind == "flow"), options.steps, options.fit_latents, refined=False
            ),
            fitted(bench, REFINED_FROM, options.steps, options.fit_latents, refined=True),
        ]
        print(
            f"\n## {kind} model, cfg {options.cfg:g}\n\n{command()}, torch {torch.__version__}. Pictures: the converged "
            f"latents of seeds {TEST_SEED} to {TEST_SEED + options.test_latents - 1}; noise: from {NOISE_SEED}; fitted: "
            f"{options.fit_latents} from {FIT_SEED}, a quarter held out. Best stock at home: {STOCK[kind]}. "
            "Errors: RMS / median distance to the converged solution from the same state."
        )
        for task in tasks(bench):
            rows, choices = lines(bench, task, tables)
            print(f"\n### {task.name}")
            print_table(
                ["steps", "denoise", "row", "σ", "evaluations", "its stock solver", "best stock at home", "row",
                 "row / its stock, RMS", "converged solution's own"], rows,
            )  # fmt: skip
            print_table(
                ["steps", "denoise", "table", "taken by held-out error", "its error / stock's",
                 "taken if stock could be", "its error / stock's", "the best that there is"], choices,
            )  # fmt: skip


if __name__ == "__main__":
    main()
