"""Two networks that nothing was chosen on: the race's list, the family, the fit's settings were all picked on the digits.

`plain`: EPS, coloured pictures of 16×16, no prompts (weights/colour_eps.safetensors). `prompted`: the demo's rectified
flow of coloured pictures; rows are fitted on one half of its prompts and measured on the other, a prompt for each latent.
Distance to the converged picture in pixels from −1 to 1.

For every number of evaluations: the best stock sampler × schedule × ending of all that ComfyUI has, chosen on the test
latents in its favour; the setting that the fit's race calls the best stock; and the row that a fit of the quality good
finds. Then fits that begin with other rows (--starts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import colour
import torch
from common import (
    FIT_SEED,
    MICRO_BATCH,
    TEST_SEED,
    Bench,
    arguments,
    converged,
    good_rows,
    print_setting,
    print_table,
)
from stock import best_stock, combinations, race_by_hosts_samplers
from torch import Tensor
from tqdm import tqdm

from dode_nodes import Group, LambdaRow, Latents
from dode_nodes.demo.colour.models import ColourModel, load_colour_model
from dode_nodes.fit.race import entrant_of
from dode_nodes.sampling.schedules import make_sigmas

WEIGHTS = Path(__file__).parent / "weights"
STEPS = (2, 3, 4, 5, 6, 8, 10, 12)
STARTS = (("euler", "karras"), ("euler", "simple"), ("euler", "beta"), ("dpmpp_2m", "sgm_uniform"))
HEATS = {"plain": ((12, 8),), "prompted": colour.HEATS}


@dataclass(frozen=True)
class PlainBench(colour.ColourBench):
    """The network without prompts, the latents to measure on, and what they converge to."""

    def fit_latents(self, latents: int, seed: int = 0) -> Latents:
        return Latents([plain(self.model, FIT_SEED + 1000 * seed, latents)], MICRO_BATCH)


def plain(model: ColourModel, first: int, latents: int) -> Group:
    """Latents of consecutive seeds."""
    drawn = [
        torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(seed))
        for seed in range(first, first + latents)
    ]
    return Group(model.denoiser(1.0), (1 + model.sigma_max**2) ** 0.5 * torch.stack(drawn), lambda _: {})


def prepare(name: str, cfg: float, latents: int) -> colour.ColourBench:
    """Load the network and converge on the latents to measure on."""
    if name == "prompted":
        return colour.prepare(load_colour_model("flow"), cfg, latents)
    model = load_colour_model("eps", folder=WEIGHTS)
    group = plain(model, TEST_SEED, latents)
    return PlainBench(model, 1.0, group, *converged(model, group))


def fitted(bench: Bench, steps: int, latents: int, solver: str = "euler", schedule: str = "") -> LambdaRow:
    """The row that a fit of the quality good finds, from a solver on a schedule, or from the usual."""
    sigmas = bench.schedule(steps)
    if schedule:
        sigmas = make_sigmas(schedule, steps, bench.model.noise_schedule)
    return min(good_rows(bench.model, bench.fit_latents(latents), sigmas, solver), key=LambdaRow.error_from)


def of_setting(bench: Bench, row: LambdaRow) -> tuple[str, Tensor]:
    """The best stock setting that the race has found: its name, and where the test latents end by it."""
    setting = row.best_stock
    if setting is None:
        raise ValueError(f"{row.label}: no race")
    first = float(row.sigmas[0])
    entrant = entrant_of(setting, row.nfe, first, bench.model.make_sigmas, None)
    if entrant is None:
        raise ValueError(f"{setting}: no such setting")
    ending = ", dropped" if setting.discard_penultimate else ""
    return f"{setting.sampler}, {setting.scheduler}{ending}", bench.sample_row(entrant.as_row())


def lines(name: str, bench: Bench, steps: Sequence[int], latents: int) -> Iterator[tuple[object, ...]]:
    """A line per number of evaluations."""
    for n in tqdm(steps, desc=name):
        row = fitted(bench, n, latents)
        chosen, of_chosen = of_setting(bench, row)
        _, stock, of_stock = best_stock(bench, combinations(bench, n), HEATS[name])
        of_row = bench.sample_row(row)
        yield (
            n, str(stock), *errors(bench, of_stock), chosen, *errors(bench, of_chosen), row.label, *errors(bench, of_row),
            *(f"{mine / best:.2f}" for mine, best in zip(errors(bench, of_row), errors(bench, of_stock), strict=True)),
            f"{bench.error(of_chosen) / bench.error(of_stock):.2f}", sum(row.report["evaluations"].values()),
        )  # fmt: skip


def errors(bench: Bench, results: Tensor) -> tuple[float, float]:
    """RMS and median."""
    return bench.error(results), bench.median(results)


def from_starts(name: str, bench: Bench, steps: Sequence[int], latents: int) -> Iterator[tuple[object, ...]]:
    """A line per start, with how much farther it leads than the best of them."""
    for n in steps:
        found = {}
        for solver, schedule in tqdm(STARTS, desc=f"{name}: starts at {n}"):
            results = bench.sample_row(fitted(bench, n, latents, solver, schedule))
            found[f"{solver}, {schedule}"] = errors(bench, results)
        least = [min(each) for each in zip(*found.values(), strict=True)]
        for start, both in found.items():
            yield (n, start, *both, *(f"{mine / best:.2f}" for mine, best in zip(both, least, strict=True)))


def main() -> None:
    """Measure and print."""
    options = arguments(
        __doc__, models=tuple(HEATS), lists={"steps": STEPS, "starts": ()}, test_latents=256, fit_latents=16
    )
    race_by_hosts_samplers()
    for name in options.models:
        bench = prepare(name, options.cfg, options.test_latents)
        print(f"\n# {name}")
        print_setting(bench)
        print(f"\n{options.fit_latents} latents to fit, a quarter of them held out.")
        print_table(
            ["evaluations", "best stock of all", "RMS", "median", "best stock of the race", "RMS", "median",
             "row, quality good", "RMS", "median", "row / best stock, RMS", "median", "race's / best stock, RMS",
             "evaluations to fit"],
            lines(name, bench, options.steps, options.fit_latents),
        )  # fmt: skip
        if options.starts:
            print_table(
                ["evaluations", "begun with", "RMS", "median", "of the best: RMS", "median"],
                from_starts(name, bench, options.starts, options.fit_latents),
            )


if __name__ == "__main__":
    main()
