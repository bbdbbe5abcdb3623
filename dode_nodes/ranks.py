"""Data-parallel over the ranks of a process group, as torchrun starts them; one process is the case of one rank.

Every rank is given the same latents and makes the same calls. The micro-batches are dealt out, each rank evaluates
its own, and what they found is gathered in the ranks' order: all ranks go on with the same numbers, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def rank_and_size() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def dealt(items: Sequence[Item]) -> list[Item]:
    """This rank's share of what all of them have."""
    rank, size = rank_and_size()
    return list(items[rank::size])


def sum_over_ranks(values: np.ndarray) -> np.ndarray:
    """The sum of all ranks' arrays, of one shape, in float64; every rank must call it.

    Summed in the ranks' order, so that all of them get the same bits.
    """
    parts = gather(torch.from_numpy(np.asarray(values, dtype=np.float64)))
    return sum(part.numpy() for part in parts)


def gather(part: Tensor | None) -> list[Tensor]:
    """All ranks' tensors, in their order, on the CPU; every rank must call it.

    They may differ in shape, not in dtype. A rank that has none gives None, and adds nothing to the list.
    """
    size = rank_and_size()[1]
    if size == 1:
        return [] if part is None else [part.cpu()]
    described: list[tuple[torch.Size, torch.dtype] | None] = [None] * size
    dist.all_gather_object(described, None if part is None else (part.shape, part.dtype))
    there = [one for one in described if one is not None]
    if not there:
        return []
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    mine = torch.zeros(max(shape.numel() for shape, _ in there), dtype=there[0][1], device=device)
    if part is not None:
        mine[: part.numel()] = part.flatten().to(device)
    everyones = [torch.empty_like(mine) for _ in described]
    dist.all_gather(everyones, mine)
    return [
        flat[: one[0].numel()].reshape(one[0]).cpu()
        for flat, one in zip(everyones, described, strict=True)
        if one is not None
    ]
