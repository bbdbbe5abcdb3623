"""The README's comparison: stock solvers and their D-variants at equal network evaluations.

For budgets of network evaluations: the best stock sampler × schedule × ending beside the D-ODE solver whose
schedule and ending were chosen on held-out latents; and each solver beside its own D-variant on one schedule,
at the largest number of steps that the budget pays. RMS distance to the converged solution at σ = 0 on test
latents, and Fréchet distance to the real digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from common import (
    MICRO_BATCH,
    SCALE,
    STUDENT_SCHEDULE,
    TEACHER,
    Bench,
    arguments,
    frechet,
    prepare,
    print_setting,
    print_table,
)
from torch import Tensor
from tqdm import tqdm

from dode_nodes import DodeError, LambdaRow, distill, run_teacher
from dode_nodes.probe import probe_student
from dode_nodes.schedules import SCHEDULES, make_sigmas
from dode_nodes.solvers import SOLVERS, resolve
from dode_nodes.table import end_error

BUDGETS = (5, 6, 8, 10)
ENDINGS = (("full", False), ("penultimate σ dropped", True))


STUDENTS = ("euler", "dpmpp_2m", "dpmpp_3m", "ipndm", "deis")
STUDENT_SCHEDULES = ("karras", "simple", "beta")
"""What the best D-ODE solver is chosen from, each with both endings and both predictions."""
SCREENED = 16
"""Test latents on which all stock combinations are tried; the best few are measured on all."""
FINALISTS = 5


@dataclass(frozen=True)
class Stock:
    """A stock sampler on a schedule with an ending."""

    solver: str
    schedule: str
    ending: str
    sigmas: Tensor


def steps_within(solver: str, budget: int, bench: Bench) -> int:
    """The largest number of steps that costs at most the budget."""
    affordable = [n for n in range(1, budget + 1) if cost(solver, bench.schedule(n)) <= budget]
    return max(affordable)


def cost(solver: str, sigmas: Tensor) -> int:
    """Network evaluations of a run."""
    return len(probe_student(resolve(solver), sigmas).sigmas)


def stock_combinations(bench: Bench, budget: int) -> Iterator[Stock]:
    """Every stock solver × schedule × ending that the budget pays."""
    for solver in SOLVERS:
        steps = steps_within(solver, budget, bench)
        for schedule in SCHEDULES:
            for ending, discard in ENDINGS:
                try:
                    sigmas = make_sigmas(
                        schedule, steps, bench.model.noise_schedule, discard_penultimate=discard
                    )
                    if cost(solver, sigmas) <= budget:
                        yield Stock(solver, schedule, ending, sigmas)
                except DodeError:  # a schedule that has no such number of steps
                    continue


def best_stock(bench: Bench, combinations: Iterable[Stock]) -> tuple[float, Stock, Tensor]:
    """Error, name and results of the best on the test latents: a choice in stock's favour."""
    some = bench.first(SCREENED)
    ranked = sorted(combinations, key=lambda c: some.error(some.sample(c.sigmas, c.solver)))
    measured = []
    for candidate in ranked[:FINALISTS]:
        results = bench.sample(candidate.sigmas, candidate.solver)
        measured.append((bench.error(results), candidate, results))
    return min(measured, key=lambda result: result[0])


def chosen_rows(bench: Bench, latents: int) -> dict[int, tuple[LambdaRow, str]]:
    """For every budget the D-ODE solver, schedule and ending with the smallest error on held-out latents."""
    group = bench.fit_group(latents)
    candidates: dict[int, list[tuple[LambdaRow, str]]] = {budget: [] for budget in BUDGETS}
    for schedule in tqdm(STUDENT_SCHEDULES, desc="schedules"):
        for ending, discard in ENDINGS:
            schedules = {
                n: make_sigmas(schedule, n, bench.model.noise_schedule, discard_penultimate=discard)
                for n in BUDGETS
            }
            targets = run_teacher(
                [group], None, list(schedules.values()), teacher=TEACHER, scale=SCALE, micro_batch=MICRO_BATCH
            )
            for n, sigmas in schedules.items():
                candidates[n] += [
                    (
                        distill([group], None, sigmas, solver=solver, prediction=prediction, targets=targets,
                                micro_batch=MICRO_BATCH),
                        f"{schedule}, {ending}",
                    )
                    for solver in STUDENTS
                    for prediction in ("noise", "data")
                ]  # fmt: skip
    return {
        budget: min(found, key=lambda candidate: end_error(candidate[0]))
        for budget, found in candidates.items()
    }


def distilled(bench: Bench, latents: int) -> dict[tuple[str, int], LambdaRow]:
    """For every solver and budget the better of noise and data, on held-out latents."""
    group = bench.fit_group(latents)
    rows = {}
    for solvers, budget_of in _teacher_runs(bench).items():
        schedules = {n: bench.schedule(n) for n in sorted(set(budget_of.values()))}
        targets = run_teacher(
            [group], None, list(schedules.values()), solvers=list(solvers), teacher=TEACHER, scale=SCALE,
            micro_batch=MICRO_BATCH,
        )  # fmt: skip
        for solver in tqdm(solvers, desc="distil"):
            found = {
                n: min(
                    (
                        distill([group], None, sigmas, solver=solver, prediction=p, targets=targets,
                                micro_batch=MICRO_BATCH)
                        for p in ("noise", "data")
                    ),
                    key=end_error,
                )
                for n, sigmas in schedules.items()
            }  # fmt: skip
            rows |= {(solver, budget): found[n] for budget, n in budget_of.items()}
    return rows


def _teacher_runs(bench: Bench) -> dict[tuple[str, ...], dict[int, int]]:
    """Solvers that take the same steps for the same budgets share one teacher run."""
    runs: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for solver in SOLVERS:
        steps = tuple((budget, steps_within(solver, budget, bench)) for budget in BUDGETS)
        runs.setdefault(steps, []).append(solver)
    return {tuple(solvers): dict(steps) for steps, solvers in runs.items()}


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, test_latents=96, fit_latents=32)
    for kind in options.models:
        bench = prepare(kind, options.cfg, options.test_latents)
        chosen = chosen_rows(bench, options.fit_latents)
        rows = distilled(bench, options.fit_latents)
        table, pairs = [], []
        for budget in tqdm(BUDGETS, desc="measure"):
            combinations = list(stock_combinations(bench, budget))
            error, stock, results = best_stock(bench, combinations)
            for solver in SOLVERS:
                row = rows[solver, budget]
                sigmas = torch.tensor(row.sigmas, dtype=torch.float32)
                plain, ours = bench.sample(sigmas, solver), bench.sample(sigmas, row=row)
                pairs.append(
                    (budget, f"{solver} ({row.prediction})", row.nfe, bench.error(plain), bench.error(ours),
                     bench.error(ours) / bench.error(plain), bench.median(plain), bench.median(ours),
                     frechet(plain), frechet(ours), row.report["shrunk_to"])
                )  # fmt: skip
            row, schedule = chosen[budget]
            our_results = bench.sample(torch.tensor(row.sigmas, dtype=torch.float32), row=row)
            our_error = bench.error(our_results)
            table.append(
                (budget, f"{stock.solver}, {stock.schedule}, {stock.ending}", error, bench.median(results),
                 frechet(results), f"D-{row.solver} ({row.prediction}), {schedule}", our_error,
                 bench.median(our_results), frechet(our_results), our_error / error)
            )  # fmt: skip
        print_setting(bench)
        print(
            f"\nλ fitted on {options.fit_latents} latents, a quarter of them held out; teacher {TEACHER}, C = {SCALE}; "
            f"students on {STUDENT_SCHEDULE[kind]}. Stock: all combinations on {SCREENED} test latents, the best "
            f"{FINALISTS} on all. Fréchet distance of the converged latents: {frechet(bench.converged):.2f}."
        )
        print_table(
            ["evaluations", "best stock of all (by RMS)", "RMS", "median", "Fréchet",
             "D-ODE, chosen on held-out latents", "RMS", "median", "Fréchet", "RMS ratio"], table,
        )  # fmt: skip
        print_table(
            ["budget", "solver", "evaluations", "stock RMS", "D-ODE RMS", "ratio", "stock median", "D-ODE median",
             "stock Fréchet", "D-ODE Fréchet", "λ shrunk to"], pairs,
        )  # fmt: skip


if __name__ == "__main__":
    main()
