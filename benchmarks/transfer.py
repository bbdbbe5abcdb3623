"""How far a table travels: fitted at one CFG, class set, latent size and precision, used at another.

Beside it at the place of use: the stock sampler that is best at home, the row of λ alone from home, rows refined for a
range of CFGs and for a range of sizes, and a row refined there. All fits are of the quality good, on as many latents;
those of a range are shared by its members.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from common import (
    FIT_SEED,
    MICRO_BATCH,
    TEST_SEED,
    arguments,
    command,
    converged,
    fitted_rows,
    print_table,
    sample_group,
)
from stock import samplers
from torch import Tensor
from tqdm import tqdm

from dode_nodes import Group, LambdaRow, Latents
from dode_nodes.demo.models import DemoModel, load_demo_model
from dode_nodes.fit.latents import mean_squares
from dode_nodes.sampling.schedules import make_sigmas
from dode_nodes.sampling.solvers import Sampler

STOCK = {"eps": "dpmpp_3m", "flow": "ipndm_v max_order=3"}
"""The best at home of all stock samplers at 6 evaluations, on this schedule."""
SCHEDULE = "beta"


@dataclass(frozen=True)
class Place:
    """What latents are sampled with.

    Attributes:
        digits: the classes, which take turns.
        side: of the latent, a square; 8 is what the network was trained on.
    """

    cfg: float = 2.0
    digits: tuple[int, ...] = tuple(range(10))
    side: int = 8
    dtype: torch.dtype = torch.float32

    def group(self, model: DemoModel, first_seed: int, latents: int) -> Group:
        """Latents of consecutive seeds."""
        labels = torch.tensor(self.digits).repeat(latents)[:latents]
        shape = (model.latent_shape[0], self.side, self.side)
        drawn = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            for seed in range(first_seed, first_seed + latents)
        ]
        scale = (1 + model.sigma_max**2) ** 0.5 if model.kind == "eps" else 1.0
        denoiser = model.to(self.dtype).denoiser(self.cfg)
        return Group(denoiser, scale * torch.stack(drawn), lambda indices: {"labels": labels[indices]})


HOME = Place()
PLACES = {
    "home": HOME,
    "cfg 1": replace(HOME, cfg=1.0),
    "cfg 1.5": replace(HOME, cfg=1.5),
    "cfg 3": replace(HOME, cfg=3.0),
    "cfg 4": replace(HOME, cfg=4.0),
    "cfg 6": replace(HOME, cfg=6.0),
    "latent 12×12": replace(HOME, side=12),
    "latent 16×16": replace(HOME, side=16),
    "bf16": replace(HOME, dtype=torch.bfloat16),
    "fp16": replace(HOME, dtype=torch.float16),
}
OTHER_DIGITS = (replace(HOME, digits=(0, 1, 2, 3, 4)), replace(HOME, digits=(5, 6, 7, 8, 9)))
CFGS = [replace(HOME, cfg=cfg) for cfg in (1.0, 2.0, 4.0, 6.0)]
SIDES = [replace(HOME, side=side) for side in (8, 12, 16)]


def rows_for(
    places: Sequence[Place], model: DemoModel, sigmas: Tensor, latents: int
) -> tuple[LambdaRow, LambdaRow]:
    """λ alone for Euler, and its refinement; the latents are shared by the places."""
    shares = [len(part) for part in torch.arange(latents).tensor_split(len(places))]
    seeds = accumulate(shares, initial=FIT_SEED)
    groups = [place.group(model, *share) for place, *share in zip(places, seeds, shares, strict=False)]
    rows = fitted_rows(model, Latents(groups, MICRO_BATCH), sigmas)
    plain, refined = ([row for row in rows if row.is_refined == refined] for refined in (False, True))
    return plain[0], min(refined or plain, key=LambdaRow.error_from)


def measured(model: DemoModel, steps: int, options: argparse.Namespace) -> Iterator[tuple[object, ...]]:
    """A line per place."""
    stock = samplers(model.kind)[STOCK[model.kind]]
    sigmas = make_sigmas(SCHEDULE, steps, model.noise_schedule)

    def rows(places: Sequence[Place]) -> tuple[LambdaRow, LambdaRow]:
        return rows_for(places, model, sigmas, options.fit_latents)

    home, of_cfgs, of_sides = rows([HOME]), rows(CFGS), rows(SIDES)
    made_for, used_on = OTHER_DIGITS
    lines = [(name, home, place) for name, place in PLACES.items()]
    lines.append(("digits 5 to 9, from 0 to 4", rows([made_for]), used_on))
    for name, (plain, refined), place in tqdm(lines, desc=f"{model.kind}, {steps} steps"):
        test = place.group(model, TEST_SEED, options.test_latents)
        end, own = converged(model, test)

        def errors(
            solver: Sampler | None, row: LambdaRow | None, test: Group = test, end: Tensor = end
        ) -> str:
            at = sigmas if row is None else torch.tensor(row.sigmas, dtype=torch.float32)
            found = mean_squares(sample_group(test, at, solver, row) - end).sqrt()
            return f"{found.square().mean().sqrt():.4f} / {found.median():.4f}"

        here = refined if place is HOME else rows([place])[1]
        fitted = (plain, refined, of_cfgs[1], of_sides[1], here)
        yield (name, errors(stock, None), *(errors(None, row) for row in fitted), own)


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, lists={"steps": (6,)}, test_latents=48, fit_latents=24)
    for kind in options.models:
        model = load_demo_model(kind)
        for steps in options.steps:
            print(
                f"\n## {kind} model, {steps} steps\n\n{command()}. RMS / median distance to the converged solution of "
                f"the place, {options.test_latents} test latents; rows fitted on {options.fit_latents}, a quarter held "
                "out. Home: "
                f"cfg {HOME.cfg:g}, all digits, 8×8, fp32. CFGs: {', '.join(f'{place.cfg:g}' for place in CFGS)}. Sizes: "
                f"{', '.join(str(place.side) for place in SIDES)}."
            )
            print_table(
                ["used at", f"stock {STOCK[kind]}", "λ alone from home", "refined from home", "refined for CFGs",
                 "refined for sizes", "refined there", "converged solution's own"], measured(model, steps, options),
            )  # fmt: skip


if __name__ == "__main__":
    main()
