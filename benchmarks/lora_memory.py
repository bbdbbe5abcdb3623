"""Memory and time of a batch that a LoRA learns from, beside those of sampling the same latents.

The demo model of landscapes, each case in a process of its own: the most memory that it took, above what it held before.
Time is of the processor, a ratio to sampling in the same process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from itertools import product

import torch
from common import command, print_table
from tqdm import tqdm

from dode_nodes import LambdaRow
from dode_nodes.demo.catalogue import PICTURES, load_model
from dode_nodes.demo.experiment import demo_latents
from dode_nodes.fit.lora import LoraRecipe, try_batch
from dode_nodes.fit.low_rank import LowRank
from dode_nodes.sampling.sample import sample_dode

CFG = 3.0
RANK = 16
_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10


def peak() -> float:
    """The most memory that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _PER_MIB


def seconds(work: Callable[[], object]) -> float:
    """Of this process's own that something takes."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def measure(steps: int, batch: int, checkpointing: bool | None) -> tuple[float, float]:
    """MiB above the network and its latents, and time in that of sampling; checkpointing None: sampling alone."""
    torch.set_num_threads(1)
    model = load_model(PICTURES)
    adapters = LowRank(model.network, RANK)
    latents = demo_latents(model, CFG, range(2 * batch))
    (group,) = latents.groups
    sigmas = torch.linspace(1, 0, steps + 1)
    row = LambdaRow("euler", sigmas.double().numpy(), (1,) * steps, [0.0] * steps)
    some = torch.arange(batch)

    def sample() -> None:
        sample_dode(group.model, group.x[some], sigmas, group.extra_args(some), disable=True, row=row)

    before = peak()
    sample()
    sampling = seconds(sample)
    if checkpointing is None:
        return peak() - before, 1.0
    recipe = LoraRecipe(1, batch, checkpointing=checkpointing)
    training = seconds(lambda: try_batch(latents, [row], adapters, recipe))
    return peak() - before, training / sampling


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 6])
    parser.add_argument("--batch", type=int, default=16, help="latents")
    options = parser.parse_args()
    ways = {"sampling": None, "learning, evaluation by evaluation": True, "learning, all kept": False}
    lines = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for steps, (name, checkpointing) in tqdm(list(product(options.steps, ways.items()))):
            mebibytes, ratio = pool.apply(measure, (steps, options.batch, checkpointing))
            lines.append((steps, name, f"{mebibytes:.0f}", f"{ratio:.1f}"))
    print(f"\n{command()}, torch {torch.__version__}. {options.batch} latents at CFG {CFG:g}, rank {RANK}.")
    print_table(["evaluations", "", "MiB", "time, in that of sampling"], lines)


if __name__ == "__main__":
    main()
