"""What fitting the whole student end to end gains: the README's main table.

For budgets of network evaluations, on one test set: the best stock sampler × schedule × ending of all that ComfyUI
has, chosen on the test latents in its favour; the D-ODE row with greedy λ whose solver, schedule and ending were
chosen on held-out latents; and a row refined end to end, begun with the best of a race and of the rows
on the beta schedule. RMS and median distance to the converged solution at σ = 0, Fréchet distance to the real digits,
and what the fit has cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from common import (
    Bench,
    arguments,
    evaluations_bar,
    frechet,
    prepare,
    print_setting,
    print_table,
)
from stock import Stock, best_stock, combinations, samplers
from torch import Tensor
from tqdm import tqdm

from dode_nodes import LambdaRow, Targets, distill, refine, run_teacher
from dode_nodes.demo.experiment import TEACHER
from dode_nodes.sampling.schedules import make_sigmas
from dode_nodes.tables.row import PREDICTIONS

BUDGETS = (4, 5, 6, 8, 10, 12)
STUDENTS = ("euler", "dpmpp_2m", "ipndm")
START = ("beta", False)
STUDENT_SCHEDULES = (("karras", False), ("karras", True), ("simple", False), START)
"""What the row with greedy λ is chosen from, each with both predictions; whether the penultimate σ is dropped."""


@dataclass(frozen=True)
class Candidate:
    """A row with greedy λ, where it comes from, and the teacher's states it was fitted to."""

    row: LambdaRow
    schedule: str
    targets: Targets


@dataclass(frozen=True)
class Measured:
    """Results on the test latents.

    Attributes:
        error, median: distance to the converged solution.
        frechet: distance to the real digits.
    """

    error: float
    median: float
    frechet: float

    @classmethod
    def of(cls, bench: Bench, results: Tensor) -> Measured:
        return cls(bench.error(results), bench.median(results), frechet(results))

    @property
    def cells(self) -> list[float]:
        """For a table."""
        return [self.error, self.median, self.frechet]


def greedy_rows(bench: Bench, latents: int, budgets: Sequence[int]) -> dict[int, list[Candidate]]:
    """For every budget the rows of all solvers, schedules and endings."""
    fit = bench.fit_latents(latents)
    found: dict[int, list[Candidate]] = {budget: [] for budget in budgets}
    for schedule, discard in tqdm(STUDENT_SCHEDULES, desc="greedy λ"):
        name = _name(schedule, discard)
        schedules = {
            n: make_sigmas(schedule, n, bench.model.noise_schedule, discard_penultimate=discard)
            for n in budgets
        }
        targets = run_teacher(fit, list(schedules.values()), TEACHER)
        for n, sigmas in schedules.items():
            found[n] += [
                Candidate(distill(targets, sigmas, solver=solver, prediction=prediction), name, targets)
                for solver in STUDENTS
                for prediction in PREDICTIONS
            ]
    return found


def _name(schedule: str, discard: bool) -> str:
    return f"{schedule}{', penultimate σ dropped' if discard else ''}"


def best_held_out(candidates: Sequence[Candidate], schedule: str | None = None) -> Candidate:
    """The one with the smallest error on held-out latents; with a schedule, of those on it."""
    among = [c for c in candidates if schedule in (None, c.schedule)]
    return min(among, key=lambda c: c.row.error_from())


def refined_row(bench: Bench, candidate: Candidate) -> LambdaRow:
    """Fitted end to end on the latents that the candidate's λ was fitted on, from the best start of a race."""
    make_sigmas = bench.model.make_sigmas
    with evaluations_bar(f"refining {candidate.row.nfe}") as tell:
        return refine(candidate.targets, candidate.row, make_sigmas=make_sigmas, progress=tell)


def evaluations_to_reach(error: float, stock: dict[int, float]) -> str:
    """How many the best stock needs for this error; log-log between the budgets that were measured."""
    budgets = sorted(stock)
    best = np.minimum.accumulate([stock[n] for n in budgets])
    if error < best[-1]:
        return f"> {budgets[-1]}"
    return f"{np.exp(np.interp(-np.log(error), -np.log(best), np.log(budgets))):.1f}"


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, lists={"budgets": BUDGETS}, test_latents=96, fit_latents=48)
    for kind in options.models:
        bench = prepare(kind, options.cfg, options.test_latents)
        found = greedy_rows(bench, options.fit_latents, options.budgets)
        greedy = {n: best_held_out(found[n]) for n in options.budgets}
        refined = {n: refined_row(bench, best_held_out(found[n], _name(*START))) for n in options.budgets}
        stock: dict[int, tuple[Stock, Measured]] = {}
        for n in tqdm(options.budgets, desc="stock"):
            _, chosen, results = best_stock(bench, combinations(bench, n))
            stock[n] = chosen, Measured.of(bench, results)
        print_setting(bench)
        tables(bench, options, stock, greedy, refined)


def tables(
    bench: Bench,
    options: object,
    stock: dict[int, tuple[Stock, Measured]],
    greedy: dict[int, Candidate],
    refined: dict[int, LambdaRow],
) -> None:
    """Print what was measured."""
    held = options.fit_latents // 4
    print(
        f"\nRows: {options.fit_latents - held} latents fitted, {held} held out; teacher {TEACHER}. "
        f"Stock: {len(samplers(bench.model.kind))} deterministic samplers. "
        f"Fréchet distance of the converged latents: {frechet(bench.converged):.2f}."
    )
    errors = {n: measured.error for n, (_, measured) in stock.items()}
    rows, costs = [], []
    for n, (chosen, of_stock) in stock.items():
        candidate, row = greedy[n], refined[n]
        of_greedy, of_refined = (Measured.of(bench, bench.sample_row(one)) for one in (candidate.row, row))
        name = f"D-{candidate.row.solver} ({candidate.row.prediction}), {candidate.schedule}"
        rows.append(
            (n, str(chosen), *of_stock.cells, name, *of_greedy.cells, *of_refined.cells,
             of_refined.error / of_stock.error,
             evaluations_to_reach(of_refined.error, errors))
        )  # fmt: skip
        spent = row.report["evaluations"]["refining"]
        report = row.report["refined"]
        held_out = [f"{stage['held_out_error']:.3f}" for stage in report["stages"]]
        raced = row.best_stock
        named = (
            ""
            if raced is None
            else f"{raced.sampler}, {raced.scheduler}{_name('', raced.discard_penultimate)}"
        )
        costs.append(
            (n, named, row.label, report["kept"], ", ".join(held_out), spent, spent / options.fit_latents)
        )
    print_table(
        ["evaluations", "best stock of all", "RMS", "median", "Fréchet", "greedy λ, chosen on held-out latents",
         "RMS", "median", "Fréchet", "refined RMS", "median", "Fréchet", "refined / stock",
         "stock needs, for refined's RMS"], rows,
    )  # fmt: skip
    print_table(
        ["evaluations", "best stock of the race", "row", "kept", "held-out error, stage by stage",
         "evaluations spent on refining", "per latent"], costs,
    )  # fmt: skip


if __name__ == "__main__":
    main()
