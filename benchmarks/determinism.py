"""The same fit again, on more threads and with the network in other number formats: how far its rows move.

Every row is measured on the test latents with the network in fp32 on one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from common import FIT_SEED, Bench, arguments, command, prepare, print_table

from dode_nodes import LambdaTable, Teacher, distill, refine, run_teacher
from dode_nodes.demo.experiment import demo_latents

SETTINGS = [
    (1, torch.float32),
    (1, torch.float32),
    (2, torch.float32),
    (1, torch.bfloat16),
    (1, torch.float16),
]
"""Threads, and the network's number format. The first is what all are compared with."""


def fit(bench: Bench, options: argparse.Namespace, threads: int, dtype: torch.dtype) -> LambdaTable:
    """A greedy row and a refined one."""
    torch.set_num_threads(threads)
    seeds = range(FIT_SEED, FIT_SEED + options.latents)
    latents = demo_latents(bench.model.to(dtype), options.cfg, seeds, options.latents)
    sigmas = bench.schedule(options.steps)
    targets = run_teacher(latents, sigmas, Teacher(scale=options.scale, flow=bench.model.kind == "flow"))
    greedy = distill(targets, sigmas)
    refined = refine(targets, greedy, budget=options.budget)
    torch.set_num_threads(1)
    return LambdaTable([greedy, refined])


def compared(bench: Bench, options: argparse.Namespace) -> Iterator[list[object]]:
    """A line for each setting."""
    first: LambdaTable | None = None
    for threads, dtype in SETTINGS:
        table = fit(bench, options, threads, dtype)
        first = first or table
        greedy, _ = table.rows
        moved = float(np.abs(greedy.weights - first.rows[0].weights).max())
        errors = [bench.error(bench.sample_row(row)) for row in table.rows]
        same = "yes" if table.sha256 == first.sha256 else "no"
        yield [threads, str(dtype).removeprefix("torch."), same, f"{moved:.1e}", *errors]


def main() -> None:
    """Fit as often as there are settings."""
    torch.set_num_threads(1)
    options = arguments(__doc__, latents=8, steps=5, scale=8, budget=2_000, test_latents=16)
    print(f"{command()}, torch {torch.__version__}")
    for kind in options.models:
        print(f"\n## {kind}")
        header = ["threads", "network", "same bits", "largest change of λ", "greedy, RMS", "refined, RMS"]
        print_table(header, compared(prepare(kind, options.cfg, options.test_latents), options))


if __name__ == "__main__":
    main()
