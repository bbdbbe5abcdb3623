"""What λ costs, and what a refined row does: ``sample_dode`` against the stock sampler, time and memory.

On a model that costs nothing the sampler's own arithmetic is everything there is: with a real network the ratio is 1.
How near to 1, for the parts of a refined row's family, is said by a U-Net of six million parameters with random weights,
a four-hundredth of SDXL's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from common import command, print_table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dode_nodes import LambdaRow, sample_dode
from dode_nodes.demo.networks import UNet
from dode_nodes.fit.student import REACH
from dode_nodes.sampling.probe import probe_student
from dode_nodes.sampling.schedules import NoiseSchedule, make_sigmas
from dode_nodes.sampling.solvers import SOLVERS
from dode_nodes.tables.free_outputs import FreeOutputs, GaussianPrior
from dode_nodes.tables.provenance import REFINED, Origin

SHAPE, STEPS, REPEATS = (4, 4, 128, 128), 8, 40
SHAPES = ((1, 4, 128, 128), (4, 4, 128, 128), (1, 16, 128, 128), (4, 16, 128, 128))
BANDS, KNOTS = 2, 12


def free_model(x: Tensor, sigma: Tensor) -> Tensor:
    """Returns its input: no evaluation is cheaper."""
    return x


def seconds(run: Callable[[], Tensor], repeats: int = REPEATS) -> float:
    """Median processor time, one thread: what else the machine does has no part in it."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        run()
        times.append(time.process_time() - begun)
    return statistics.median(times)


def peak_latents(run: Callable[[], Tensor]) -> float:
    """Peak of what the run allocates, in latents of this batch."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / (torch.Size(SHAPE).numel() * 4)


def rows_of_all(sigmas: Tensor) -> Iterator[tuple[str, LambdaRow]]:
    """A row with λ for every solver and prediction, and one as refinement makes them."""
    for solver in SOLVERS:
        queries = probe_student(SOLVERS[solver], sigmas)
        lambdas = np.full(len(queries.sigmas), 0.1)
        for prediction in ("noise", "data"):
            yield solver, LambdaRow(solver, sigmas.double().numpy(), queries.per_step, lambdas, prediction)
    weights = np.eye(STEPS) + 0.1 * sum(np.eye(STEPS, k=-j) for j in range(1, REACH))
    made_for = ("euler", sigmas.double().numpy(), (1,) * STEPS)
    yield "euler, refined", LambdaRow(*made_for, weights, "noise", form="history")


def rows_of_the_family(channels: int) -> Iterator[tuple[str, LambdaRow]]:
    """Of as many network evaluations, with more and more of what a refined row may have."""
    prior = GaussianPrior(np.zeros(channels), np.tile(np.eye(channels), (KNOTS, 1, 1)))
    for name, bands, free in (
        ("weights", 1, FreeOutputs()),
        ("and a free first step", 1, FreeOutputs(first=True)),
        (f"and {BANDS} bands", BANDS, FreeOutputs(first=True)),
        ("and the start", BANDS, FreeOutputs(first=True, start=True)),
        ("and a Gaussian denoiser", BANDS, FreeOutputs(first=True, start=True, gaussian=prior)),
    ):
        queries = STEPS + free.first
        weights = np.full((bands, queries, free.columns + queries), 0.1)
        own = weights[:, :, free.columns :]
        own *= np.tri(queries) - np.tri(queries, k=-REACH)
        sigmas, plain = (make_sigmas("karras", n, NoiseSchedule.stable_diffusion()) for n in (queries, STEPS))
        simple = bands == 1 and not free.columns
        row = LambdaRow(
            "euler", sigmas.double().numpy(), (1,) * queries, weights[0] if simple else weights, "noise", form="history",
            free=free, origin=Origin(REFINED, "euler", {}, plain.double().numpy()),
        )  # fmt: skip
        yield name, row


def shares_of_a_run(shape: tuple[int, ...]) -> Iterator[tuple[str, float]]:
    """What the arithmetic of each row adds to Euler's, over what the evaluations take."""
    network = UNet(shape[1], (64, 128, 256), 256).requires_grad_(False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.full((shape[0],), 500.0)
    evaluations = STEPS * seconds(lambda: network(x, timesteps, None), repeats=3)
    sigmas = make_sigmas("karras", STEPS, NoiseSchedule.stable_diffusion())
    euler = seconds(lambda: sample_dode(free_model, x, sigmas, disable=True, solver="euler"))
    for name, row in rows_of_the_family(shape[1]):
        own = torch.tensor(row.sigmas, dtype=torch.float32)
        ours = seconds(lambda row=row, own=own: sample_dode(free_model, x, own, disable=True, row=row))
        yield name, (ours - euler) / evaluations


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    sigmas = make_sigmas("karras", STEPS, NoiseSchedule.stable_diffusion())
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    rows = []
    for name, row in rows_of_all(sigmas):
        stock = lambda row=row: sample_dode(free_model, x, sigmas, disable=True, solver=row.solver)  # noqa: E731
        ours = lambda row=row: sample_dode(free_model, x, sigmas, disable=True, row=row)  # noqa: E731
        ours(), stock()
        rows.append(
            (name, row.prediction, seconds(ours) / seconds(stock), peak_latents(stock), peak_latents(ours))
        )
    print(f"{command()}, {STEPS} steps on {SHAPE}, seed 0, a model that costs nothing.")
    print_table(["solver", "prediction", "time ratio", "stock peak (latents)", "D-ODE peak (latents)"], rows)
    print(f"\nMore than Euler takes, as a part of {STEPS} evaluations of the U-Net:")
    shares = [dict(shares_of_a_run(shape)) for shape in SHAPES]
    print_table(
        ["a refined row with", *map(str, SHAPES)],
        [(name, *(f"{share[name]:.2%}" for share in shares)) for name in shares[0]],
    )


if __name__ == "__main__":
    main()
