"""Learned solvers from the literature on our eps model, by their authors' own code, beside refined rows.

    python benchmarks/learned.py --checkouts DIR --methods refined dyweight amed gits --steps 5 6 8

Theirs, imported at run time from checkouts in DIR, each under its repository's name: ``literature/`` says for every
method what is theirs, which recipe it follows, and what was chosen here, always on the latents from 2,000,000 on.

Ours: the model behind the interface that they call; the loops around their losses, as theirs want CUDA, a process group
and their networks (same optimiser, rates, clipping and order of updates); latents of variance σ_max² + 1 instead of
σ_max²; σ_min and σ_max, our model's.

Their samplers end at σ_min = 0.029, and that is the state which is compared to the converged solution at σ = 0:
denoising on costs an evaluation. What is fitted to σ_min is also compared to the converged solution there. A backward
pass counts as two evaluations, a Jacobian-vector product as one beside the evaluation that comes with it, and parallel
evaluations count like others.

Left out: the flow model. Their samplers want x = x0 + σ·noise, where a rectified flow starts at an infinite σ.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Bench, fitted_rows, prepare, print_setting, print_table, sample_group
from literature import amed, consistency_solver, dpm_solver_v3, dyweight, epd, generalized_solver, gits, ld3
from literature.bridge import Method, NotPossible, Outcome
from torch import Tensor

from dode_nodes import LambdaRow
from dode_nodes.fit.latents import root_mean_square
from dode_nodes.fit.quality import QUALITIES
from dode_nodes.fit.scope import UNIT
from dode_nodes.sampling.schedules import make_sigmas

OURS = "refined"
LIMIT = 30_000
"""Evaluations of a limited fit of ours: a tenth of what the literature's may cost."""


@dataclass(frozen=True)
class Refined:
    """Ours, as the nodes fit: of a quality; without one, limited, on the noises of best. ``noises``: in place of the
    quality's."""

    quality: str | None = None
    noises: int | None = None

    @property
    def latents(self) -> int:
        """Noises to fit on."""
        return self.noises or QUALITIES[self.quality or "best"].latents

    def budget(self, steps: int) -> float:
        """The refinement's; see ``Recipe``."""
        if self.quality:
            return QUALITIES[self.quality].refine_budget
        others = 2  # for the teacher, for λ, and for runs from later steps
        return LIMIT / (self.latents * UNIT * steps) - others

    def __str__(self) -> str:
        what = f"quality {self.quality}" if self.quality else f"at most {LIMIT} evaluations"
        return f"{what}; {self.latents} latents, a quarter held out"


def refined(bench: Bench, steps: int, _: Path | None, variant: Refined) -> Outcome:
    """Fit and measure ours."""
    latents = bench.fit_latents(variant.latents)
    rows = fitted_rows(bench.model, latents, bench.schedule(steps), refine_budget=variant.budget(steps))
    row = min(rows, key=LambdaRow.error_from)
    return Outcome(
        solver="refined D-ODE",
        settings=str(variant),
        images=variant.latents,
        fitting=sum(row.report["evaluations"].values()),
        states=bench.sample_row(row),
        per_latent=row.nfe,
    )


METHODS = {
    OURS: Method(refined, (Refined("good"), Refined("good", 48), Refined(), Refined("best"))),
    "dyweight": dyweight.METHOD,
    "amed": amed.METHOD,
    "gits": gits.METHOD,
    "consistency-solver": consistency_solver.METHOD,
    "dpm-solver-v3": dpm_solver_v3.METHOD,
    "epd": epd.METHOD,
    "gs": generalized_solver.METHOD,
    "ld3": ld3.METHOD,
}


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 6, 8], help="network evaluations")
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--test-latents", type=int, default=96)
    parser.add_argument(
        "--checkouts", type=Path, default=Path(), help="folder with theirs, each under its name"
    )
    options = parser.parse_args()
    for name in options.methods:
        folder = METHODS[name].folder(options.checkouts)
        if folder and not folder.is_dir():
            parser.error(f"{name} needs a checkout of {METHODS[name].repository} in --checkouts")
    return options


def commit(folder: Path | None) -> str:
    """The commit that is checked out there; ours without a folder."""
    command = ["git", "-C", str(folder or Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603


def converged_at_sigma_min(bench: Bench) -> Tensor:
    """The converged solution where their samplers end."""
    return sample_group(
        bench.test, make_sigmas("karras", 160, bench.model.noise_schedule)[:-1], "ipndm", None
    )


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    options = parse()
    places = {name: METHODS[name].folder(options.checkouts) for name in options.methods}
    bench = prepare("eps", options.cfg, options.test_latents)
    at_sigma_min = converged_at_sigma_min(bench)
    rows = []
    for steps in options.steps:
        for name, folder in places.items():
            for variant in METHODS[name].variants:
                start = time.perf_counter()
                try:
                    found = METHODS[name].measure(bench, steps, folder, variant)
                except NotPossible:
                    continue
                rows.append(
                    (f"{found.per_latent:g}", found.solver, found.settings, bench.error(found.states),
                     bench.median(found.states), root_mean_square(found.states - at_sigma_min), found.images,
                     found.fitting, round(time.perf_counter() - start))
                )  # fmt: skip
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print_setting(bench)
    commits = ", ".join(f"{name} {commit(folder)}" for name, folder in {OURS: None, **places}.items())
    print(
        f"\nCommits: {commits}. "
        f"The converged solution moves by {root_mean_square(at_sigma_min - bench.converged):.4f} RMS from σ_min to 0."
    )
    print_table(
        ["evaluations", "solver", "settings", "RMS", "median", "RMS at σ_min", "fitted on images", "evaluations to fit",
         "seconds"], rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
