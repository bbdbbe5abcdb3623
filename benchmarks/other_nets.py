"""Two networks that nothing was chosen on: the race's list, the family, the fit's settings were all picked on the digits.

`plain`: EPS, coloured pictures of 16×16, no prompts (weights/colour_eps.safetensors). `prompted`: the demo's rectified
flow of landscapes; rows are fitted on one half of its prompts and measured on the other, a prompt for each latent.
Distance to the converged picture in pixels from −1 to 1.

For every number of evaluations: the best stock sampler × schedule × ending of all that ComfyUI has, chosen on the test
latents in its favour; and for fits of the qualities good and best the setting that the fit's race calls the best stock,
and the row. Then fits of the quality good that begin with other rows (--starts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import colour
from common import (
    FIT_SEED,
    MICRO_BATCH,
    STEPS,
    TEST_SEED,
    Bench,
    arguments,
    converged,
    nearest_row,
    print_setting,
    print_starts,
    print_table,
)
from stock import best_stock, combinations, race_by_hosts_samplers
from torch import Tensor
from tqdm import tqdm

from dode_nodes import Group, LambdaRow, Latents
from dode_nodes.demo.colour.models import ColourModel, load_colour_model
from dode_nodes.fit.quality import GOOD, QUALITIES
from dode_nodes.fit.race import entrant_of

WEIGHTS = Path(__file__).parent / "weights"
HEATS = {"plain": ((12, 8),), "prompted": colour.HEATS}


@dataclass(frozen=True)
class PlainBench(colour.ColourBench):
    """The network without prompts, the latents to measure on, and what they converge to."""

    def fit_latents(self, latents: int, seed: int = 0) -> Latents:
        return Latents([plain(self.model, FIT_SEED + 1000 * seed, latents)], MICRO_BATCH)


def plain(model: ColourModel, first: int, latents: int) -> Group:
    """Latents of consecutive seeds."""
    return Group(model.denoiser(1.0), model.noise(range(first, first + latents)), lambda _: {})


def prepare(name: str, cfg: float, latents: int) -> colour.ColourBench:
    """Load the network and converge on the latents to measure on."""
    if name == "prompted":
        return colour.prepare(load_colour_model("flow"), cfg, latents)
    model = load_colour_model("eps", folder=WEIGHTS)
    group = plain(model, TEST_SEED, latents)
    return PlainBench(model, 1.0, group, *converged(model, group))


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


def lines(
    name: str, bench: Bench, steps: Sequence[int], qualities: Sequence[str], latents: int
) -> Iterator[tuple[object, ...]]:
    """A line per number of evaluations and quality; latents as the quality has, if they are 0."""
    for n in tqdm(steps, desc=name):
        _, stock, of_stock = best_stock(bench, combinations(bench, n), HEATS[name])
        for quality in qualities:
            fitted_on = latents or QUALITIES[quality].latents
            row = nearest_row(bench, fitted_on, bench.schedule(n), quality=quality)
            chosen, of_chosen = of_setting(bench, row)
            best, raced, mine = (bench.errors(each) for each in (of_stock, of_chosen, bench.sample_row(row)))
            yield (
                n, str(stock), *best, f"{quality}, {fitted_on} latents", chosen, *raced, row.label, *mine,
                *(f"{error / of_best:.2f}" for error, of_best in zip(mine, best, strict=True)),
                f"{raced[0] / best[0]:.2f}", sum(row.report["evaluations"].values()),
            )  # fmt: skip


def main() -> None:
    """Measure and print."""
    options = arguments(
        __doc__, models=tuple(HEATS), lists={"steps": STEPS, "starts": ()}, words={"qualities": (GOOD, "best")},
        test_latents=256, fit_latents=0,
    )  # fmt: skip
    race_by_hosts_samplers()
    for name in options.models:
        bench = prepare(name, options.cfg, options.test_latents)
        print(f"\n# {name}")
        print_setting(bench)
        print_table(
            ["evaluations", "best stock of all", "RMS", "median", "fit", "best stock of the race", "RMS", "median",
             "row", "RMS", "median", "row / best stock, RMS", "median", "race's / best stock, RMS",
             "evaluations to fit"],
            lines(name, bench, options.steps, options.qualities, options.fit_latents),
        )  # fmt: skip
        if options.starts:
            print_starts(bench, options.starts, options.fit_latents or QUALITIES[GOOD].latents)


if __name__ == "__main__":
    main()
