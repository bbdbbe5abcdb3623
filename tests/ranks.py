"""What test_ranks.py starts under torchrun: the same calls on every rank, and what came of them as a file a rank.

torchrun --nproc-per-node 2 tests/ranks.py FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dode_nodes import Group, LambdaRow, distill, refine, run_teacher
from dode_nodes.groups import Progress, held_out, micro_batches
from dode_nodes.ranks import (
    failing_together,
    gather,
    process_group,
    rank_and_size,
    signals_wait,
    sum_over_ranks,
)
from tests.oracles import two_peaks
from tests.toys import karras, latents


def fitted(micro_batch: int | None = None) -> list[LambdaRow]:
    """Rows of two groups, 5 and 2 latents (one is held out), distilled on one teacher's run, then refined."""
    groups = [Group(two_peaks, latents(5)), Group(two_peaks, latents(2, seed=1))]
    sigmas = karras(4)
    targets = run_teacher(groups, None, sigmas, micro_batch=micro_batch)
    row = distill(groups, None, sigmas, targets=targets, micro_batch=micro_batch)
    return [row, refine(groups, None, row, targets=targets, micro_batch=micro_batch)]


def as_json(row: LambdaRow) -> dict[str, Any]:
    """All of a row."""
    return row.to_json() | {name: array.tolist() for name, array in row.arrays().items()}


def gathered() -> dict[str, Any]:
    """What ranks have that differ in shape or in having anything."""
    rank = rank_and_size()[0]
    parts = {
        "first has none": None if rank == 0 else torch.full((rank, 2), 0.1, dtype=torch.bfloat16),
        "first has most": torch.arange(3 - rank),
        "last has none": torch.eye(2, dtype=torch.float64)[None] if rank == 0 else None,
        "no numbers": torch.zeros(rank + 1, 0, 0),
        "none has any": None,
    }
    return {
        name: [[list(one.shape), str(one.dtype), one.tolist()] for one in gather(part)]
        for name, part in parts.items()
    }


def shares() -> dict[str, list[int]]:
    """This rank's latents of 5 + 2, and of the one held out."""
    groups = [Group(two_peaks, latents(5)), Group(two_peaks, latents(2))]
    wanted = {"all": None, "held out": held_out(groups), "one at a time": None}
    sizes = {"one at a time": 1}
    return {
        name: [batch.numbers.tolist() for batch in micro_batches(groups, sizes.get(name), only)]
        for name, only in wanted.items()
    }


def not_a_number_on_the_last_rank() -> None:
    """Its answers are NaN from the third on."""
    asked = 0
    last = rank_and_size()[0] == rank_and_size()[1] - 1

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return two_peaks(x, sigma) * (float("nan") if last and asked > 2 else 1)

    distill(model, latents(4), karras(4))


def signal_to_the_last_rank() -> None:
    """As Ctrl-C or the end of another rank brings it, amid an evaluation of the refinement."""
    last = rank_and_size()[0] == rank_and_size()[1] - 1
    with signals_wait() as stop_if_asked:

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            if last and told == "refining":
                os.kill(os.getpid(), signal.SIGINT)
            return two_peaks(x, sigma)

        def tell(p: Progress) -> None:
            nonlocal told
            told = p.stage
            stop_if_asked()

        told = ""
        row = distill(model, latents(4), karras(4))
        refine(model, latents(4), row, progress=tell)


def ending_of(work: Callable[[], None]) -> list[str]:
    """What it raises on this rank, under ``failing_together``."""
    try:
        with failing_together():
            work()
    except BaseException as error:
        kept = getattr(error, "best_row", None)
        return [type(error).__name__, str(error), kept and kept.label]
    return []


def main(folder: Path) -> None:
    """On every rank."""
    with process_group():
        rank, size = rank_and_size()
        found = {
            "size": size,
            "gathered": gathered(),
            "sum": float(sum_over_ranks(rank + 0.1)),
            "shares": shares(),
            "rows": [as_json(row) for row in fitted()],
            "nan": ending_of(not_a_number_on_the_last_rank),
            "signal": ending_of(signal_to_the_last_rank),
            "rows after that": [as_json(row) for row in fitted(micro_batch=1)],
        }
        (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
