"""What end-to-end refinement needs, and what of it pays.

Fits of the quality good: the error on test latents against the number of latents, and from other rows to begin with. All
that pays, with parts of the family left out. And without a race, from the row that greedy λ gives Euler on the beta
schedule: with fewer kinds of numbers to fit; and on a network that is told σ rounded to a table of 1000, as hosts do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from common import (
    MICRO_BATCH,
    Bench,
    arguments,
    converged,
    nearest_row,
    prepare,
    print_setting,
    print_starts,
    print_table,
)
from torch import Tensor
from tqdm import tqdm

from dode_nodes import Latents, Progress, distill, run_teacher
from dode_nodes.demo.experiment import TEACHER
from dode_nodes.demo.models import DemoModel
from dode_nodes.fit.evaluator import Evaluator
from dode_nodes.fit.latents import in_order
from dode_nodes.fit.levenberg_marquardt import LeastSquaresProblem, levenberg_marquardt
from dode_nodes.fit.refine import Refinement
from dode_nodes.fit.student import Parameter, Student, history_parameters, lambda_parameters, sigma_parameters
from dode_nodes.sampling.denoiser import dode_corrections
from dode_nodes.sampling.solvers import sample_euler

LATENTS = (4, 8, 16, 48, 128)
FREE, ALL = "a free first step", "all four"
PARTS = {
    "nothing": (),
    FREE: (),
    "the start": ("with the start",),
    "bands": ("in bands",),
    "a Gaussian denoiser": ("with a Gaussian denoiser",),
    ALL: ("with the start", "in bands", "with a Gaussian denoiser"),
}
JACOBIANS = 4
START = "beta"
UNPLANNED = 2**31
"""Evaluations at most, where nobody is told of progress."""


@dataclass(frozen=True)
class Found:
    """A student after a Jacobian.

    Attributes:
        error, median: on the test latents.
        held_out: RMS distance to the teacher on the latents held out of the fit.
    """

    error: float
    median: float
    held_out: float


def families(steps: int) -> dict[str, list[Parameter]]:
    """What may be fitted."""
    sigmas = sigma_parameters(steps)
    return {
        "λ": lambda_parameters(steps),
        "λ, σ": lambda_parameters(steps) + sigmas,
        "W over 2": history_parameters(steps, 2),
        "W over 2, σ": history_parameters(steps, 2) + sigmas,
        "W over 3, σ": history_parameters(steps, 3) + sigmas,
        "W over 4": history_parameters(steps, 4),
        "W over 4, σ": history_parameters(steps, 4) + sigmas,
        "W over all, σ": history_parameters(steps, steps) + sigmas,
    }


def fitted(
    bench: Bench, latents: Latents, sigmas: Tensor, parameters: Sequence[Parameter]
) -> Iterator[Found]:
    """Greedy λ for Euler, then Jacobian after Jacobian."""
    targets = run_teacher(latents, sigmas, TEACHER)
    row = distill(targets, sigmas)
    evaluator = Evaluator(Progress(UNPLANNED))
    fit, check = (
        LeastSquaresProblem(targets, part, evaluator, "refining")
        for part in (latents.fitted, latents.held_out)
    )
    start = fit.run(Student(sample_euler, "noise", row.sigmas, dode_corrections(row.weights)))

    def found(student: Student) -> Found:
        batches = Latents([bench.test], MICRO_BATCH).batches()
        ends = in_order(batches, [student.run(batch.group.model, batch)[0] for batch in batches])
        return Found(bench.error(ends), bench.median(ends), check.run(student).error)

    yield found(start.student)
    for played in levenberg_marquardt(fit, start, parameters, JACOBIANS):
        yield found(played.student)


def best(found: Sequence[Found]) -> Found:
    """The one that is best on the latents held out."""
    return min(found, key=lambda f: f.held_out)


def against_latents(bench: Bench, steps: Sequence[int]) -> None:
    """Errors for so many latents, and what the fit has cost."""
    rows = []
    for n in steps:
        for latents in tqdm(LATENTS, desc=f"latents, {n} steps"):
            row = nearest_row(bench, latents, bench.schedule(n))
            spent = sum(row.report["evaluations"].values())
            rows.append((n, latents, *bench.errors(bench.sample_row(row)), spent, row.label))
    print("\nLatents, a quarter of them held out:")
    print_table(["evaluations a picture", "latents", "RMS", "median", "evaluations in all", "row"], rows)


class Without(Refinement):
    """A refinement that leaves out a part of the family."""

    left_out: Sequence[str] = ()

    def _parts(self) -> dict[str, Callable[[Student], Student]]:
        parts = super()._parts()
        for name in self.left_out:
            del parts[name]
        return parts


def against_parts(bench: Bench, steps: Sequence[int], latents: int) -> None:
    """Errors with the whole family, and with a part of it left out."""
    rows = []
    for n in steps:
        fit = bench.fit_latents(latents)
        sigmas = bench.schedule(n)
        for name, left_out in tqdm(PARTS.items(), desc=f"parts, {n} steps"):
            free_first = name not in (FREE, ALL)
            targets = run_teacher(replace(fit, free_first=free_first), sigmas, TEACHER)
            refinement = Without(targets, distill(targets, sigmas), make_sigmas=bench.model.make_sigmas)
            refinement.left_out = left_out
            row = refinement.run()
            rows.append((n, name, *bench.errors(bench.sample_row(row)), row.label))
    print(f"\nParts of the family left out, all that pays on {latents} latents:")
    print_table(["evaluations", "without", "RMS", "median", "row"], rows)


def against_families(bench: Bench, steps: Sequence[int], latents: int) -> None:
    """Errors of the families of numbers, from one schedule."""
    cells: dict[str, list[object]] = {}
    for n in steps:
        for name, parameters in tqdm(families(n).items(), desc=f"families, {n} steps"):
            chosen = best(
                list(fitted(bench, bench.fit_latents(latents), bench.schedule(n, START), parameters))
            )
            cells.setdefault(name, []).extend((len(parameters), chosen.error, chosen.median))
    print(f"\nWhat is fitted, on {latents} latents:")
    heads = [f"{n} steps: {what}" for n in steps for what in ("numbers", "RMS", "median")]
    print_table(["", *heads], [(name, *values) for name, values in cells.items()])


class RoundedModel(DemoModel):
    """Tells its network σ rounded to the table of 1000, as ComfyUI does."""

    def timestep(self, sigma: Tensor) -> Tensor:
        return self.noise_schedule.timestep(sigma.float()).float()


def rounded(bench: Bench) -> Bench:
    """The bench with such a network, and where its latents end."""
    model = RoundedModel(bench.model.kind, bench.model.network, bench.model.noise_schedule)
    test = replace(bench.test, model=model.denoiser(bench.cfg))
    return Bench(model, bench.cfg, test, *converged(model, test))


def against_rounding(bench: Bench, steps: Sequence[int], latents: int) -> None:
    """Whether fitting σ survives the hosts' table."""
    coarse = rounded(bench)
    rows = []
    for name in ("W over 4", "W over 4, σ"):
        errors = []
        for n in steps:
            for one in (bench, coarse):
                numbers = families(n)[name]
                errors.append(
                    best(list(fitted(one, one.fit_latents(latents), one.schedule(n, START), numbers))).error
                )
        rows.append((name, *errors))
    print(f"\nσ as the network is told it, {latents} latents:")
    print_table(["", *(f"{n} steps: {what}" for n in steps for what in ("exact", "rounded to 1000"))], rows)


AGAINST: dict[str, Callable[[Bench, Sequence[int], int], None]] = {
    "latents": lambda bench, steps, _: against_latents(bench, steps),
    "families": against_families,
    "starts": print_starts,
    "parts": against_parts,
    "rounding": against_rounding,
}


def main() -> None:
    """Measure and print."""
    options = arguments(
        __doc__, lists={"steps": (5, 8)}, words={"against": AGAINST}, test_latents=96, fit_latents=48
    )
    for kind in options.models:
        bench = prepare(kind, options.cfg, options.test_latents)
        print_setting(bench)
        print(f"Teacher {TEACHER}; what is fitted without a race begins with D-euler (noise) on {START}.")
        for name in options.against:
            if (kind, name) != ("flow", "rounding"):  # flow models' timesteps are not rounded
                AGAINST[name](bench, options.steps, options.fit_latents)


if __name__ == "__main__":
    main()
