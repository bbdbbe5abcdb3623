"""The model of landscapes: prompts that leave something open, decoded to pixels.

Rectified flow, latents 4×16×16, 64×64 pixels. Each latent has a prompt of its own, of one to three words.
Prompts are in two halves that share none (`prompts_of`, seed 0): the table that ships was fitted on one half, and is
measured on the first prompts of the other. All noises are taken as they come.

Pixels in −1 … 1, clamped. RMS and median distance to the converged picture of: Euler on simple; the best stock
setting, of all that ComfyUI has, chosen on the measured latents themselves, in its favour; the table's row with greedy
λ; its refined row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import FIT_SEED, MICRO_BATCH, TEST_SEED, Bench, command, converged, print_table
from refinement import LAMBDAS, row_of
from stock import best_stock, combinations
from torch import Tensor
from tqdm import tqdm

from dode_nodes import Group, LambdaTable, Latents
from dode_nodes.demo.colour.models import ColourModel, load_colour_model
from dode_nodes.demo.experiment import in_turns
from dode_nodes.tables.picture_grid import Block, PictureRow, picture_grid

SHOWN = 12  # latents
DRAWN = ("Euler", "best stock", "D-ODE")
REFERENCE_SCALE = 8
HEATS = ((12, 40),)
"""Of stock settings: an evaluation takes eight times as long as the digits'. (With four latents in a first heat, one that
runs away decides: the setting that was found at 6 evaluations was 13 % farther.)"""


@dataclass(frozen=True)
class ColourBench(Bench):
    """The colour model, the latents to measure on, and what they converge to."""

    model: ColourModel

    def fit_latents(self, latents: int, seed: int = 0) -> Latents:
        """Of the prompts that nothing is measured on, in turns."""
        prompts = in_turns(self.model.fitted_on, latents)
        return Latents([prompted(self.model, self.cfg, FIT_SEED + 1000 * seed, prompts)], MICRO_BATCH)

    def from_converged(self, results: Tensor) -> Tensor:
        """The difference in pixels."""
        return self.pixels(results) - self.pixels(self.converged)

    def pixels(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, 64, 64] in −1 … 1."""
        return self.model.decode(latents).clamp(-1, 1)


def prompted(model: ColourModel, cfg: float, first: int, prompts: Sequence[str]) -> Group:
    """A latent for each prompt."""
    labels = model.labels(prompts)
    noise = model.noise(range(first, first + len(prompts)))
    return Group(model.denoiser(cfg), noise, lambda indices: {"labels": labels[indices]})


def prepare(model: ColourModel, cfg: float, latents: int) -> ColourBench:
    """Converge on the latents to measure on."""
    group = prompted(model, cfg, TEST_SEED, model.prompts()[1][:latents])
    return ColourBench(model, cfg, group, *converged(model, group, scale=REFERENCE_SCALE))


def samples(bench: ColourBench, table: LambdaTable, budget: int) -> dict[str, tuple[str, Tensor]]:
    """What ran, in words, and the latents that it led to."""
    _, stock, of_stock = best_stock(bench, combinations(bench, budget), HEATS)
    greedy, refined = (row_of(table, budget, refined=refined) for refined in (False, True))
    simple = bench.model.make_sigmas("simple", budget, False)
    return {
        "Euler": ("euler, simple", bench.sample(simple, "euler")),
        "best stock": (str(stock), of_stock),
        "greedy λ": (greedy.label, bench.sample_row(greedy)),
        "D-ODE": (refined.label, bench.sample_row(refined)),
    }


def line(bench: ColourBench, budget: int, found: dict[str, tuple[str, Tensor]]) -> list[object]:
    """Of the table."""
    error = {name: bench.error(latents) for name, (_, latents) in found.items()}
    median = {name: bench.median(latents) for name, (_, latents) in found.items()}
    measured = [f"{error[name]:.3f} / {median[name]:.3f}" for name in found]
    ratios = [
        f"{error['D-ODE'] / error[name]:.2f} / {median['D-ODE'] / median[name]:.2f}"
        for name in ("best stock", "Euler")
    ]
    return [f"{bench.cfg:g}", budget, found["best stock"][0], *measured, *ratios]


def draw(bench: ColourBench, budget: int, found: dict[str, tuple[str, Tensor]]) -> Path:
    """The first latents, one way below the other."""
    shown = slice(SHOWN)
    rows = [
        PictureRow(
            f"{name}: distance {bench.error(found[name][1]):.3f}",
            bench.model.pictures(found[name][1][shown]).numpy(),
            stock=name != DRAWN[-1],
        )
        for name in DRAWN
    ]
    rows.append(
        PictureRow("converged", bench.model.pictures(bench.converged[shown]).numpy(), heads_group=True)
    )
    title = f"Same noise, same network, cfg {bench.cfg:g}, {budget} evaluations"
    figure = picture_grid(rows, [Block(title, [""] * SHOWN)])
    out = Path(__file__).parent / "figures" / f"colour_{budget}.jpg"
    figure.savefig(out, dpi=100, pil_kwargs={"quality": 88})
    return out


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[3, 4, 5, 6], help="network evaluations")
    parser.add_argument("--latents", type=int, default=64, help="to measure on")
    options = parser.parse_args()

    model = load_colour_model("flow")
    table = LambdaTable.load(LAMBDAS / f"demo_{model.name}.safetensors")
    bench = prepare(model, table.rows[0].settings["cfg"], options.latents)
    lines, pictures = [], []
    for budget in tqdm(options.budgets, desc="measure"):
        found = samples(bench, table, budget)
        lines.append(line(bench, budget, found))
        pictures.append(draw(bench, budget, found))
    fitted = table.rows[0].settings["latents"]
    print(f"\n## Landscapes\n\n{command()}, torch {torch.__version__}. Test latents: seeds {TEST_SEED} to "
          f"{TEST_SEED + options.latents - 1}; the table: {fitted} latents of other prompts, a quarter of them held out. "
          f"Converged: half as many steps change the latents by {bench.reference_error:.1e} RMS. Errors: RMS / "
          "median.")  # fmt: skip
    print_table(
        ["cfg", "evaluations", "best stock", "Euler", "best stock", "greedy λ", "D-ODE", "D-ODE ÷ best stock",
         "D-ODE ÷ Euler"], lines,
    )  # fmt: skip
    print("\nPictures:", *pictures)


if __name__ == "__main__":
    main()
