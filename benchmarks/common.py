"""What the benchmarks share: the embedded models, three sets of latents, and the converged solution.

λ is fitted on one set, checked (no harm, which prediction) on a quarter of it, and measured on a set of
its own that nothing was chosen on. The stock baselines are the best *on that set*: a choice in their favour.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from dode_nodes import (
    Group,
    LambdaRow,
    Latents,
    Pipeline,
    Progress,
    Recipe,
    Teacher,
    run_teacher,
    sample_dode,
)
from dode_nodes.demo.experiment import TEACHER, demo_latents
from dode_nodes.demo.frechet import digit_features, frechet_distance_to_real
from dode_nodes.demo.models import KINDS, DemoModel, load_demo_model
from dode_nodes.demo.vae import decode_to_picture
from dode_nodes.fit.latents import root_mean_square
from dode_nodes.fit.quality import GOOD, QUALITIES, start_schedule
from dode_nodes.sampling.schedules import make_sigmas
from dode_nodes.sampling.solvers import Sampler
from dode_nodes.sigmas import HOST_RTOL

FIT_SEED, TEST_SEED = 1_000_000, 3_000_000
"""The latents from 2,000,000 on were looked at while the refinement was designed: no number comes from them."""
MICRO_BATCH = 32
STEPS = (2, 3, 4, 5, 6, 8, 10, 12)
"""Evaluations of the tables that ship."""
_REFERENCE = {"solver": "ipndm", "steps": 12, "schedule": {"eps": "karras", "flow": "beta"}, "scale": 16}
"""A teacher of 12 × 16 steps, the interval into σ = 0 cut as finely: 4e-3 from a last step from σ_min to 0 on EPS."""


@dataclass(frozen=True)
class Bench:
    """A model, the latents to measure on, and where they converge.

    Attributes:
        reference_error: RMS change of the converged solution when its steps are halved.
    """

    model: DemoModel
    cfg: float
    test: Group
    converged: Tensor
    reference_error: float

    def fit_latents(self, latents: int, seed: int = 0) -> Latents:
        """Latents to distil on; another ``seed``, other latents."""
        return demo_latents(self.model, self.cfg, _seeds(FIT_SEED + 1000 * seed, latents), MICRO_BATCH)

    def first(self, latents: int) -> Bench:
        """The same with fewer test latents."""
        test = replace(self.test, x=self.test.x[:latents])
        return replace(self, test=test, converged=self.converged[:latents])

    def schedule(self, steps: int, name: str | None = None) -> Tensor:
        """The students' schedule; None for where a fit begins if nobody says otherwise."""
        name = name or start_schedule(flow=self.model.kind == "flow")
        return make_sigmas(name, steps, self.model.noise_schedule)

    def sample(
        self, sigmas: Tensor, solver: str | Sampler | None = None, row: LambdaRow | None = None
    ) -> Tensor:
        """The test latents by a stock solver or a row."""
        return sample_group(self.test, sigmas, solver, row)

    def sample_row(self, row: LambdaRow) -> Tensor:
        """The test latents by a row, on its own schedule."""
        return self.sample(torch.tensor(row.sigmas, dtype=torch.float32), row=row)

    def from_converged(self, results: Tensor) -> Tensor:
        """The difference of which errors are the size, ``[B, …]``."""
        return results - self.converged

    def error(self, results: Tensor) -> float:
        """RMS distance to the converged solution."""
        return root_mean_square(self.from_converged(results))

    def median(self, results: Tensor) -> float:
        """The median latent's distance: a few latents that end as another picture dominate the RMS."""
        return float(self.from_converged(results).double().flatten(1).square().mean(1).sqrt().median())

    def errors(self, results: Tensor) -> tuple[float, float]:
        """RMS and median."""
        return self.error(results), self.median(results)


def _seeds(first: int, latents: int) -> range:
    return range(first, first + latents)


def sample_group(group: Group, sigmas: Tensor, solver: str | Sampler | None, row: LambdaRow | None) -> Tensor:
    """All latents of a group, a few at a time."""
    parts = torch.arange(len(group.x)).split(MICRO_BATCH)
    return torch.cat([
        sample_dode(group.model, group.x[part], sigmas, group.extra_args(part), disable=True, solver=solver, row=row)
        for part in parts
    ])  # fmt: skip


def frechet(results: Tensor) -> float:
    """Fréchet distance to the real digits, in the classifier's features."""
    return frechet_distance_to_real(digit_features(decode_to_picture(results)))


def prepare(kind: str, cfg: float, latents: int) -> Bench:
    """Load the model and converge on the test latents."""
    model = load_demo_model(kind)
    (test,) = demo_latents(model, cfg, _seeds(TEST_SEED, latents)).groups
    return Bench(model, cfg, test, *converged(model, test))


def converged(
    model: DemoModel, group: Group, start: float | None = None, scale: int = _REFERENCE["scale"]
) -> tuple[Tensor, float]:
    """Where a group's latents end, and how much that changes when the steps are halved, RMS.

    Args:
        start: the σ that they are at; None for the schedule's highest.
        scale: steps for each of twelve.
    """
    sigmas = make_sigmas(_REFERENCE["schedule"][model.kind], _REFERENCE["steps"], model.noise_schedule)
    if start is not None:
        scale //= 2  # what is left of the way bends less
        below = sigmas[sigmas < start * (1 - HOST_RTOL)]
        sigmas = torch.cat([torch.tensor([start], dtype=sigmas.dtype), below])
    with evaluations_bar(f"{model.kind}: converged solution") as tell:
        teacher = Teacher(_REFERENCE["solver"], scale, flow=model.kind == "flow")
        targets = run_teacher(Latents([group], MICRO_BATCH), sigmas, teacher, progress=tell)
    return targets.ends[0], targets.own_error


def fitted_rows(
    model: DemoModel,
    latents: Latents,
    sigmas: Tensor,
    solver: str = "euler",
    *,
    refine_budget: float = QUALITIES[GOOD].refine_budget,
    progress: Callable[[Progress], None] | None = None,
) -> list[LambdaRow]:
    """What a fit finds on a schedule: λ alone, and its refinement; by default with the budget of the quality good."""
    recipe = Recipe(
        solvers=[solver], teacher=TEACHER, refine_budget=refine_budget, make_sigmas=model.make_sigmas
    )  # fmt: skip
    return Pipeline(latents, [sigmas], recipe).run(progress)


def nearest_row(
    bench: Bench, latents: int, sigmas: Tensor, solver: str = "euler", quality: str = GOOD
) -> LambdaRow:
    """The nearest that a fit of such a quality finds on so many latents."""
    budget = QUALITIES[quality].refine_budget
    with evaluations_bar(f"{bench.model.name}: {len(sigmas) - 1} steps, {quality}") as tell:
        rows = fitted_rows(
            bench.model, bench.fit_latents(latents), sigmas, solver, refine_budget=budget, progress=tell
        )
    return min(rows, key=LambdaRow.error_from)


STARTS = (
    ("euler", "karras"),
    ("euler", "exponential"),
    ("euler", "simple"),
    ("euler", "beta"),
    ("dpmpp_2m", "sgm_uniform"),
    ("ipndm", "kl_optimal"),
)
"""Of fits: a solver on a schedule each."""


def print_starts(bench: Bench, steps: Sequence[int], latents: int) -> None:
    """Errors from several rows to begin with, and how much farther each is than the best."""
    rows: list[tuple[object, ...]] = []
    for n in steps:
        found = {}
        for solver, name in tqdm(STARTS, desc=f"{bench.model.name}: starts, {n} steps"):
            row = nearest_row(bench, latents, bench.schedule(n, name), solver)
            found[f"{solver}, {name}"] = bench.errors(bench.sample_row(row))
        least = [min(errors) for errors in zip(*found.values(), strict=True)]
        for start, errors in found.items():
            ratios = (error / best for error, best in zip(errors, least, strict=True))
            rows.append((n, start, *errors, *(f"{ratio:.2f}" for ratio in ratios)))
    print(f"\nThe row to begin with, {latents} latents:")
    print_table(["evaluations", "begun with", "RMS", "median", "of the best: RMS", "median"], rows)


@contextmanager
def evaluations_bar(what: str) -> Iterator[Callable[[Progress], None]]:
    """A bar over network evaluations; yields what is to be told of them."""
    with tqdm(desc=what, unit=" evaluations", unit_scale=True) as bar:

        def tell(p: Progress) -> None:
            bar.total = p.total
            bar.update(p.done - bar.n)

        yield tell


def arguments(
    description: str,
    *,
    lists: Mapping[str, Sequence[int]] | None = None,
    words: Mapping[str, Iterable[str]] | None = None,
    models: Sequence[str] = KINDS,
    **defaults: int,
) -> argparse.Namespace:
    """The options that every benchmark has, and its own whole numbers, or lists of them, with their defaults.

    Args:
        words: lists of names, all of them where none is given.
        models: what there is to choose from.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=models,
        default=[name for name in models if name in KINDS] or list(models),
    )
    parser.add_argument("--cfg", type=float, default=2.0)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    for name, values in (lists or {}).items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=list(values))
    for name, choices in (words or {}).items():
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), default=list(choices))
    return parser.parse_args()


def command() -> str:
    """What was run, as code in Markdown."""
    return f"`{shlex.join(['python', *sys.argv])}`"


def print_setting(bench: Bench, fitted_from: int = FIT_SEED) -> None:
    """What the tables below were measured on."""
    print(f"\n## {bench.model.name} model, cfg {bench.cfg:g}\n")
    print(f"{command()}, torch {torch.__version__}, {platform.machine()}. ", end="")
    print(
        f"Test latents: seeds {TEST_SEED} to {TEST_SEED + len(bench.test.x) - 1}; fitted: from {fitted_from}. ",
        end="",
    )
    print(
        f"Converged: {_REFERENCE['solver']}, {_REFERENCE['steps'] * _REFERENCE['scale']} steps; "
        f"half as many change it by {bench.reference_error:.1e} RMS."
    )


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Markdown."""
    print("\n| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(_cell(value) for value in row) + " |")


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
