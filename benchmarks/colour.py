"""The colour model: prompts that leave something open, decoded to pixels.

Rectified flow, latents 4×16×16, 64×64 pixels. Each latent has a prompt of its own: a word, or two that a picture has.
Prompts are in two halves that share none (`prompts_of`, seed 0): rows are fitted on the first prompts of one half, and
measured on the first of the other. All noises are taken as they come.

Pixels in −1 … 1, clamped. RMS and median distance to the converged picture of: Euler on simple; the best stock
setting, of all that ComfyUI has, chosen on the measured latents themselves, in its favour; the row with greedy λ; the
refined row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import FIT_SEED, MICRO_BATCH, TEST_SEED, Bench, command, converged, evaluations_bar, print_table
from stock import best_stock, combinations
from torch import Tensor
from tqdm import tqdm

from dode_nodes import Group, LambdaRow, Latents, Teacher
from dode_nodes.demo.colour.models import ColourModel, load_colour_model
from dode_nodes.demo.experiment import in_turns
from dode_nodes.fit.pipeline import Pipeline, Recipe

START = "beta"
TEACHER = Teacher("dpmpp_2m", scale=10, flow=True)
REFERENCE_SCALE = 8
HEATS = ((4, 64), (12, 8))
"""Of stock settings: an evaluation takes eight times as long as the digits'."""


@dataclass(frozen=True)
class ColourBench(Bench):
    """The colour model, the latents to measure on, and what they converge to."""

    model: ColourModel

    def fit_latents(self, latents: int, seed: int = 0) -> Latents:
        """Of the prompts that nothing is measured on, in turns."""
        prompts = in_turns(self.model.prompts()[0], latents)
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


def prepare(model: ColourModel, cfg: float, latents: int, without: Sequence[str] = ()) -> ColourBench:
    """Converge on the latents to measure on, of all prompts but these."""
    prompts = [prompt for prompt in model.prompts()[1] if prompt not in without]
    group = prompted(model, cfg, TEST_SEED, prompts[:latents])
    return ColourBench(model, cfg, group, *converged(model, group, scale=REFERENCE_SCALE))


def fitted(
    model: ColourModel, cfg: float, budgets: Sequence[int], latents: int, refine_budget: float
) -> list[LambdaRow]:
    """Rows with greedy λ on the beta schedule and refined ones, of all budgets."""
    group = prompted(model, cfg, FIT_SEED, model.prompts()[0][:latents])
    schedules = [model.make_sigmas(START, n, False) for n in budgets]
    recipe = Recipe(teacher=TEACHER, refine_budget=refine_budget, make_sigmas=model.make_sigmas)
    pipeline = Pipeline(Latents([group], MICRO_BATCH), schedules, recipe)
    with evaluations_bar(f"cfg {cfg:g}: rows") as tell:
        return pipeline.run(tell)


def best_row(rows: Sequence[LambdaRow], budget: int, refined: bool) -> LambdaRow:
    """By its error on held-out latents, as a user would choose."""
    among = [row for row in rows if row.nfe == budget and row.is_refined == refined]
    return min(among, key=LambdaRow.error_from)


def samples(bench: ColourBench, rows: Sequence[LambdaRow], budget: int) -> dict[str, tuple[str, Tensor]]:
    """What ran, in words, and the latents that it led to."""
    _, stock, of_stock = best_stock(bench, combinations(bench, budget), HEATS)
    greedy, refined = (best_row(rows, budget, refined) for refined in (False, True))
    simple = bench.model.make_sigmas("simple", budget, False)
    return {
        "Euler": ("euler, simple", bench.sample(simple, "euler")),
        "best stock": (str(stock), of_stock),
        "greedy λ": (greedy.label, bench.sample_row(greedy)),
        "refined": (refined.label, bench.sample_row(refined)),
    }


def line(bench: ColourBench, budget: int, found: dict[str, tuple[str, Tensor]]) -> list[object]:
    """Of the table."""
    error = {name: bench.error(latents) for name, (_, latents) in found.items()}
    median = {name: bench.median(latents) for name, (_, latents) in found.items()}
    measured = [f"{error[name]:.3f} / {median[name]:.3f}" for name in found]
    ratios = [
        f"{error['refined'] / error[name]:.2f} / {median['refined'] / median[name]:.2f}"
        for name in ("best stock", "Euler")
    ]
    return [f"{bench.cfg:g}", budget, found["best stock"][0], *measured, *ratios]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cfgs", type=float, nargs="+", default=[3.0, 5.0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[3, 4, 5, 6], help="network evaluations")
    parser.add_argument("--fit-latents", type=int, default=32, help="a quarter of them is held out")
    parser.add_argument("--latents", type=int, default=64, help="to measure on")
    parser.add_argument("--refine-budget", type=float, default=12.0)
    parser.add_argument("--save", type=Path, help="a file for everything that was sampled, by torch.save")
    options = parser.parse_args()

    model = load_colour_model("flow")
    lines, errors, kept = [], [], {}
    for cfg in options.cfgs:
        rows = fitted(model, cfg, options.budgets, options.fit_latents, options.refine_budget)
        bench = prepare(model, cfg, options.latents)
        errors.append(f"{bench.reference_error:.1e}")
        for budget in tqdm(options.budgets, desc="measure"):
            found = samples(bench, rows, budget)
            lines.append(line(bench, budget, found))
            tqdm.write(str(lines[-1]))
            kept[cfg, budget] = found | {"converged": ("", bench.converged)}
            if options.save is not None:
                torch.save(kept, options.save)
    print(f"\n## Colour model\n\n{command()}, torch {torch.__version__}. Test latents: seeds {TEST_SEED} to "
          f"{TEST_SEED + options.latents - 1}; fitted: {FIT_SEED} to {FIT_SEED + options.fit_latents - 1}, a quarter "
          f"of them held out; teacher {TEACHER}. Converged: half as many steps change the latents by "
          f"{', '.join(errors)} RMS. Errors: RMS / median.")  # fmt: skip
    print_table(
        ["cfg", "evaluations", "best stock", "Euler", "best stock", "greedy λ", "refined", "refined ÷ best stock",
         "refined ÷ Euler"], lines,
    )  # fmt: skip


if __name__ == "__main__":
    main()
