"""What λ costs, and what a refined row does: ``sample_dode`` against the stock sampler, time and memory.

On a model that costs nothing the sampler's own arithmetic is everything there is: with a real network the ratio is 1.
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
from dode_nodes.fit.student import REACH
from dode_nodes.sampling.probe import probe_student
from dode_nodes.sampling.schedules import NoiseSchedule, make_sigmas
from dode_nodes.sampling.solvers import SOLVERS

SHAPE, STEPS, REPEATS = (4, 4, 128, 128), 8, 40


def free_model(x: Tensor, sigma: Tensor) -> Tensor:
    """Returns its input: no evaluation is cheaper."""
    return x


def seconds(run: Callable[[], Tensor]) -> float:
    """Median processor time, one thread: what else the machine does has no part in it."""
    times = []
    for _ in range(REPEATS):
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


if __name__ == "__main__":
    main()
