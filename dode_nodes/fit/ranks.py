"""Shares the work among the ranks of a process group, as torchrun starts them. One process is one rank.

Every rank gets the same latents and makes the same calls. Each rank evaluates its share of the latents. The
results are gathered in the ranks' order, so all ranks go on with the same numbers, to the bit.

Ranks that stop making the same calls wait for each other for ever. So a rank that fails tells the others in place
of its next part (``failing_together``), and no signal interrupts an exchange (``signals_wait``).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import DodeError

Item = TypeVar("Item")

_NOTHING, _PART, _FAILURE, _INTERRUPT = range(4)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
_MOST_AXES = 8


class RankFailed(Exception):
    """Another rank has failed; the message is that rank's, if it could still give one."""


class RankInterrupted(KeyboardInterrupt):
    """Another rank was interrupted."""


def rank_and_size() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first_rank() -> bool:
    """Whether this is the process that prints and writes, by torchrun's environment: also before there is a group."""
    return not is_one_of_several() or os.environ["RANK"] == "0"


def is_one_of_several() -> bool:
    """Whether torchrun, or what does as it does, has started this process. RANK alone is set by others, too."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextmanager
def process_group() -> Iterator[None]:
    """The group that torchrun's environment describes; without torchrun there is none.

    nccl with a GPU per rank where there are GPUs, else gloo. At the end all ranks wait for each other: torchrun
    ends everybody as soon as one has ended in an error, and the first may still have to write.

    Raises:
        DodeError: there are fewer GPUs than ranks on this machine.
    """
    if not is_one_of_several():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        if ranks_here > gpus:
            raise DodeError(
                f"start torchrun with --nproc-per-node {gpus}: each of the {ranks_here} processes needs its own GPU"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
        backend = "nccl"
    dist.init_process_group(backend)
    try:
        yield
    finally:
        with suppress(RankFailed, RankInterrupted):
            meet()
        dist.destroy_process_group()


@contextmanager
def failing_together() -> Iterator[None]:
    """Work that all ranks do: where it fails on one, it fails on all.

    Raises:
        RankFailed: on the others, from the next of their calls in which all ranks take part.
        RankInterrupted: likewise, where it was a KeyboardInterrupt.
    """
    try:
        yield
    except (RankFailed, RankInterrupted):  # known to all
        raise
    except BaseException as error:
        if rank_and_size()[1] > 1:
            kind = _INTERRUPT if isinstance(error, KeyboardInterrupt) else _FAILURE
            words = f"rank {rank_and_size()[0]}: {error if isinstance(error, DodeError) else repr(error)}"
            with suppress(RankFailed, RankInterrupted):  # others have failed, too
                _exchange(kind, torch.frombuffer(bytearray(words.encode()), dtype=torch.uint8))
        raise


@contextmanager
def signals_wait() -> Iterator[Callable[[], None]]:
    """Under several ranks, SIGINT and SIGTERM end the work only where the function that this gives is called.

    Call it between exchanges, such as after every evaluation. In one process nothing is changed.

    Raises:
        KeyboardInterrupt: (the function) there was a signal.
    """
    if rank_and_size()[1] == 1:
        yield lambda: None
        return
    received: list[int] = []

    def stop_if_asked() -> None:
        if received:
            raise KeyboardInterrupt

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in signals]
    try:
        yield stop_if_asked
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This rank's part of what all of them have, a run of neighbours.

    Lengths differ by one at most, and the first rank's is the longest: it tells of progress.
    """
    rank, size = rank_and_size()
    start, end = (-(-len(items) * r // size) for r in (rank, rank + 1))
    return items[start:end]


def meet() -> None:
    """Wait until all ranks are here; every rank must call it."""
    gather(None)


def sum_over_ranks(values: np.ndarray) -> np.ndarray:
    """The sum of all ranks' arrays, of one shape, in float64; every rank must call it.

    Summed in the ranks' order, so that all of them get the same bits.
    """
    parts = gather(torch.from_numpy(np.asarray(values, dtype=np.float64)))
    total: np.ndarray = np.sum([part.numpy() for part in parts], axis=0)
    return total


def add_up(tensors: Sequence[Tensor]) -> None:
    """Put the sum of all ranks' in the place of each tensor; every rank must call it, with tensors of the same shapes,
    one dtype and one device.

    Summed in the ranks' order, so that all of them get the same bits.
    """
    if rank_and_size()[1] == 1:
        return
    first, *others = gather(torch.cat([x.detach().flatten() for x in tensors]))
    parts = torch.split(sum(others, first), [x.numel() for x in tensors])
    with torch.no_grad():
        for x, total in zip(tensors, parts, strict=True):
            x.copy_(total.reshape(x.shape))


def gather(part: Tensor | None) -> list[Tensor]:
    """All ranks' tensors, in their order, on the CPU; every rank must call it.

    They may differ in shape. A rank that has none gives None, and adds nothing to the list.

    Raises:
        RankFailed, RankInterrupted: a rank has said so in its part's place (``failing_together``).
    """
    if rank_and_size()[1] == 1:
        return [] if part is None else [part.cpu()]
    return _exchange(_NOTHING, torch.empty(0)) if part is None else _exchange(_PART, part)


def _exchange(kind: int, part: Tensor) -> list[Tensor]:
    """What all ranks bring, in two steps: what it is, then its bytes. The parts of those that have one."""
    part = part.detach().contiguous()
    head = [kind, _DTYPES.index(part.dtype), part.ndim, *part.shape, *[0] * (_MOST_AXES - part.ndim)]
    heads = [_Head(*one.tolist()) for one in _all_gather(torch.tensor(head))]
    content = torch.zeros(max(one.bytes for one in heads), dtype=torch.uint8)
    content[: heads[rank_and_size()[0]].bytes] = part.cpu().flatten().view(torch.uint8)
    contents = [of[: one.bytes] for one, of in zip(heads, _all_gather(content), strict=True)]
    for one, of in zip(heads, contents, strict=True):
        if one.kind == _INTERRUPT:
            raise RankInterrupted
        if one.kind == _FAILURE:
            raise RankFailed(of.numpy().tobytes().decode(errors="replace"))
    return [
        of.view(one.dtype).reshape(one.shape)
        for one, of in zip(heads, contents, strict=True)
        if one.kind == _PART
    ]


class _Head:
    """What a rank brings: its kind, dtype and shape, as numbers that have the same length for all."""

    def __init__(self, kind: int, dtype: int, axes: int, *shape: int) -> None:
        self.kind = kind
        self.dtype = _DTYPES[dtype]
        self.shape = torch.Size(shape[:axes])
        self.bytes = self.shape.numel() * self.dtype.itemsize


def _all_gather(mine: Tensor) -> list[Tensor]:
    """Tensors of one shape and dtype, by way of the device that the group's backend wants."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    mine = mine.to(device)
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    if mine.numel():
        try:
            dist.all_gather(everyones, mine)
        except RuntimeError as error:
            raise RankFailed(f"another rank has ended: {error}") from error
    return [one.cpu() for one in everyones]
