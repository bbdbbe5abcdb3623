"""Each stock solver beside its own D-variant, with greedy λ, at equal network evaluations on one schedule.

At the largest number of steps that a budget pays. RMS and median distance to the converged solution at σ = 0 on
test latents, and Fréchet distance to the real digits. What is best of all, and what refinement gains beyond λ:
refinement.py.
"""

from __future__ import annotations

from common import (
    Bench,
    arguments,
    frechet,
    prepare,
    print_setting,
    print_table,
)
from tqdm import tqdm

from dode_nodes import LambdaRow, distill, run_teacher
from dode_nodes.demo.experiment import TEACHER
from dode_nodes.fit.quality import start_schedule
from dode_nodes.sampling.probe import probe_student
from dode_nodes.sampling.solvers import SOLVERS, resolve
from dode_nodes.tables.row import PREDICTIONS

BUDGETS = (5, 6, 8, 10)


def steps_within(solver: str, budget: int, bench: Bench) -> int:
    """The largest number of steps that costs at most the budget."""
    affordable = [
        n
        for n in range(1, budget + 1)
        if len(probe_student(resolve(solver), bench.schedule(n)).sigmas) <= budget
    ]
    return max(affordable)


def distilled(bench: Bench, latents: int) -> dict[tuple[str, int], LambdaRow]:
    """For every solver and budget the better of noise and data, on held-out latents."""
    fit = bench.fit_latents(latents)
    rows = {}
    for solvers, budget_of in _teacher_runs(bench).items():
        schedules = {n: bench.schedule(n) for n in sorted(set(budget_of.values()))}
        targets = run_teacher(fit, list(schedules.values()), TEACHER, solvers=list(solvers))
        for solver in tqdm(solvers, desc="distil"):
            found = {
                n: min(
                    (distill(targets, sigmas, solver=solver, prediction=p) for p in PREDICTIONS),
                    key=LambdaRow.error_from,
                )
                for n, sigmas in schedules.items()
            }
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
        rows = distilled(bench, options.fit_latents)
        pairs = []
        for budget in tqdm(BUDGETS, desc="measure"):
            for solver in SOLVERS:
                row = rows[solver, budget]
                plain, ours = bench.sample(bench.schedule(row.steps), solver), bench.sample_row(row)
                pairs.append(
                    (budget, f"{solver} ({row.prediction})", row.nfe, bench.error(plain), bench.error(ours),
                     bench.error(ours) / bench.error(plain), bench.median(plain), bench.median(ours),
                     frechet(plain), frechet(ours), row.report["shrunk_to"])
                )  # fmt: skip
        print_setting(bench)
        print(
            f"\nλ fitted on {options.fit_latents} latents, a quarter of them held out; teacher {TEACHER}; "
            f"on {start_schedule(flow=kind == 'flow')}. "
            f"Fréchet distance of the converged latents: {frechet(bench.converged):.2f}."
        )
        print_table(
            ["budget", "solver", "evaluations", "stock RMS", "D-ODE RMS", "ratio", "stock median", "D-ODE median",
             "stock Fréchet", "D-ODE Fréchet", "λ shrunk to"], pairs,
        )  # fmt: skip


if __name__ == "__main__":
    main()
