"""What end-to-end refinement needs, and what of it pays.

From the row that greedy λ gives Euler on the beta schedule: the error on test latents against the number of latents
(a quarter of them held out) and against Jacobians; with fewer kinds of numbers to fit; from other schedules; and on
a network that is told σ rounded to a table of 1000, as hosts do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from common import MICRO_BATCH, Bench, arguments, converged, prepare, print_setting, print_table
from torch import Tensor
from tqdm import tqdm

from dode_nodes import Latents, Progress, distill, run_teacher
from dode_nodes.demo.experiment import TEACHER
from dode_nodes.demo.models import DemoModel
from dode_nodes.fit.evaluator import Evaluator
from dode_nodes.fit.latents import in_order
from dode_nodes.fit.levenberg_marquardt import LeastSquaresProblem, levenberg_marquardt
from dode_nodes.fit.student import Parameter, Student, history_parameters, lambda_parameters, sigma_parameters
from dode_nodes.sampling.denoiser import dode_corrections
from dode_nodes.sampling.schedules import make_sigmas
from dode_nodes.sampling.solvers import sample_euler

LATENTS = (4, 8, 16, 48, 96)
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
        evaluations: spent by then, the teacher's included.
        teacher: the teacher's.
    """

    error: float
    median: float
    held_out: float
    evaluations: int
    teacher: int


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
        spent = targets.evaluations + sum(list(row.report["evaluations"].values())[1:]) + evaluator.spent()
        return Found(
            bench.error(ends), bench.median(ends), check.run(student).error, spent, targets.evaluations
        )

    yield found(start.student)
    for played in levenberg_marquardt(fit, start, parameters, JACOBIANS):
        yield found(played.student)


def best(found: Sequence[Found]) -> Found:
    """As ``refine`` chooses: the one that is best on the latents held out, at the cost of all."""
    return replace(min(found, key=lambda f: f.held_out), evaluations=found[-1].evaluations)


def schedule(bench: Bench, name: str, steps: int) -> Tensor:
    """The students' σ to begin with."""
    return make_sigmas(name, steps, bench.model.noise_schedule)


def against_latents(bench: Bench, steps: Sequence[int]) -> None:
    """Errors, Jacobian after Jacobian, for so many latents."""
    rows = []
    for n in steps:
        for latents in tqdm(LATENTS, desc=f"latents, {n} steps"):
            fit = bench.fit_latents(latents)
            found = list(fitted(bench, fit, schedule(bench, START, n), families(n)["W over 4, σ"]))
            errors = [f"{f.error:.4f}" for f in found] + ["="] * (JACOBIANS + 1 - len(found))
            chosen = best(found)
            rows.append((n, latents, *errors, chosen.error, chosen.median, chosen.evaluations,
                         f"{chosen.evaluations / chosen.teacher - 1:.1f}"))  # fmt: skip
    print(
        "\nLatents and Jacobians (=: ended, for the last one gained less than 1 %); kept: the best on the held-out."
    )
    print_table(
        ["steps", "latents", "greedy λ", *(f"Jacobian {i + 1}" for i in range(JACOBIANS)), "kept: RMS", "median",
         "evaluations in all", "beyond the teacher's, in its multiples"], rows,
    )  # fmt: skip


def against_families(bench: Bench, steps: Sequence[int], latents: int) -> None:
    """Errors of the families of numbers, from one schedule."""
    cells: dict[str, list[object]] = {}
    for n in steps:
        for name, parameters in tqdm(families(n).items(), desc=f"families, {n} steps"):
            chosen = best(
                list(fitted(bench, bench.fit_latents(latents), schedule(bench, START, n), parameters))
            )
            cells.setdefault(name, []).extend((len(parameters), chosen.error, chosen.median))
    print(f"\nWhat is fitted, on {latents} latents:")
    heads = [f"{n} steps: {what}" for n in steps for what in ("numbers", "RMS", "median")]
    print_table(["", *heads], [(name, *values) for name, values in cells.items()])


def against_schedules(bench: Bench, steps: Sequence[int], latents: int) -> None:
    """Errors from several schedules to begin with."""
    names = ("karras", "exponential", "simple", "beta", "kl_optimal")
    rows = []
    for name in tqdm(names, desc="schedules"):
        errors: list[float] = []
        for n in steps:
            numbers = families(n)["W over 4, σ"]
            found = list(fitted(bench, bench.fit_latents(latents), schedule(bench, name, n), numbers))
            errors += [found[0].error, best(found).error]
        rows.append((name, *errors))
    print(f"\nThe schedule to begin with, {latents} latents:")
    print_table(["", *(f"{n} steps: {what}" for n in steps for what in ("greedy λ", "refined"))], rows)


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
                    best(list(fitted(one, one.fit_latents(latents), schedule(one, START, n), numbers))).error
                )
        rows.append((name, *errors))
    print(f"\nσ as the network is told it, {latents} latents:")
    print_table(["", *(f"{n} steps: {what}" for n in steps for what in ("exact", "rounded to 1000"))], rows)


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, lists={"steps": (5, 8)}, test_latents=96, fit_latents=48)
    for kind in options.models:
        bench = prepare(kind, options.cfg, options.test_latents)
        print_setting(bench)
        print(f"Teacher {TEACHER}; students begin with D-euler (noise) on {START}.")
        against_latents(bench, options.steps)
        against_families(bench, options.steps, options.fit_latents)
        against_schedules(bench, options.steps, options.fit_latents)
        if kind == "eps":  # flow models' timesteps are not rounded
            against_rounding(bench, options.steps, options.fit_latents)


if __name__ == "__main__":
    main()
