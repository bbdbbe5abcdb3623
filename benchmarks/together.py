"""What a fit for many numbers of steps costs, and loses, beside the fits one by one.

Both of the quality good, on the same latents; the whole fit counts, the figures from unseen latents too.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import (
    MICRO_BATCH,
    STEPS,
    TEST_SEED,
    Bench,
    arguments,
    evaluations_bar,
    prepare,
    print_setting,
    print_table,
)
from tqdm import tqdm

from dode_nodes import LambdaRow, Pipeline, Progress, Recipe
from dode_nodes.demo.experiment import TEACHER, demo_latents
from dode_nodes.fit.headline import LATENTS as UNSEEN
from dode_nodes.fit.quality import GOOD, QUALITIES


def fitted(bench: Bench, steps: Sequence[int], seed: int) -> tuple[dict[int, LambdaRow], int]:
    """The nearest row for each number of steps, and what all of them have cost."""
    quality = QUALITIES[GOOD]
    recipe = Recipe(
        teacher=TEACHER, refine_budget=quality.refine_budget, make_sigmas=bench.model.make_sigmas, or_stock=True
    )  # fmt: skip
    first = TEST_SEED - UNSEEN * (seed + 1)
    unseen = demo_latents(bench.model, bench.cfg, range(first, first + UNSEEN), MICRO_BATCH)
    schedules = [bench.schedule(n) for n in steps]
    pipeline = Pipeline(bench.fit_latents(quality.latents, seed), schedules, recipe, unseen)
    told: list[Progress] = []
    with evaluations_bar(f"{bench.model.name}: {', '.join(map(str, steps))} steps") as tell:

        def note(progress: Progress) -> None:
            told[:] = [progress]
            tell(progress)

        rows = pipeline.run(note)
    nearest = {n: min((row for row in rows if row.nfe == n), key=LambdaRow.error_from) for n in steps}
    return nearest, told[0].done


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, lists={"steps": STEPS}, test_latents=96, seeds=2)
    for kind in options.models:
        bench = prepare(kind, options.cfg, options.test_latents)
        lines, costs = [], [0, 0]
        for seed in tqdm(range(options.seeds), desc=kind):
            together, cost = fitted(bench, options.steps, seed)
            costs[0] += cost
            for n in options.steps:
                alone, cost = fitted(bench, [n], seed)
                costs[1] += cost
                ends = [bench.sample_row(row) for row in (together[n], alone[n])]
                cells = [error for end in ends for error in bench.errors(end)]
                lines.append((seed, n, *cells, f"{cells[0] / cells[2]:.2f}", f"{cells[1] / cells[3]:.2f}"))
        print_setting(bench)
        print(f"\nAll together {costs[0]} evaluations, one by one {costs[1]}: {costs[0] / costs[1]:.2f}.")
        print_table(
            [
                "latents",
                "evaluations",
                "together: RMS",
                "median",
                "alone: RMS",
                "median",
                "ratio, RMS",
                "median",
            ],
            sorted(lines, key=lambda line: line[1]),
        )


if __name__ == "__main__":
    main()
