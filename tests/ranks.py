"""What test_ranks.py starts under torchrun: the same calls on every rank, and what came of them as a file a rank.

torchrun --nproc-per-node 2 tests/ranks.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dode_nodes import Group, distill, refine, run_teacher
from dode_nodes.ranks import gather, rank_and_size, sum_over_ranks
from tests.oracles import two_peaks
from tests.toys import karras, latents


def fitted(micro_batch: int | None) -> list:
    """Rows of two groups, 5 and 3 latents, distilled on one teacher's run, then refined."""
    groups = [Group(two_peaks, latents(5)), Group(two_peaks, latents(3, seed=1))]
    sigmas = karras(4)
    targets = run_teacher(groups, None, sigmas, micro_batch=micro_batch)
    row = distill(groups, None, sigmas, targets=targets, micro_batch=micro_batch)
    return [row, refine(groups, None, row, targets=targets, micro_batch=micro_batch)]


def main(folder: Path) -> None:
    """On every rank."""
    dist.init_process_group("gloo")
    rank, size = rank_and_size()
    part = None if rank == 0 else torch.full((rank, 2), float(rank))
    gathered = [tensor.tolist() for tensor in gather(part)]
    rows = [[[a.tolist() for a in row.arrays().values()], row.to_json()] for row in fitted(None)]
    result = {"size": size, "gathered": gathered, "sum": float(sum_over_ranks(rank + 0.1)), "rows": rows}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
