"""Tells one checkpoint from another by samples of its weights, in every host, layout and number format.

A sample is the first numbers of a weight, or of a square block of one: of every n-th of a matrix' rows, if it has a
multiple of n, the length of a row. So it does not matter what a weight is called, in which order weights come, whether
q, k and v are joined, whether halves are swapped, and whether a convolution of one pixel is a matrix. Of large networks
those samples are kept whose first numbers ascend in pairs: another layout or number format chooses the same. Where
rounding makes a pair equal, a sample is missing; it never brings one that was not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .gate import SAMPLE_LENGTH, Facts

_MOST_SAMPLES = 128
_MOST_BLOCKS = 12
"""Of one weight; the joined matrices of today's networks have up to seven."""
_SAME_NUMBERS = 0.75
"""Of a sample's numbers, so that it is that sample. In fp8, moved weights often round to what they were."""
_SAME_SAMPLES = 0.95
"""Layouts differ in a few weights; a LoRA of the attention alone that was merged moves a fifth."""
_MOVED = 0.01 * 0.8
"""Mean distance of weights that were moved by 1 % at random, as a share of each."""
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FORMATS = (torch.float32, torch.float16, torch.bfloat16, *_FP8)


def fingerprint(weights: Iterable[Tensor]) -> dict[str, Any]:
    """Up to 128 samples, as a table keeps them; nothing where no weight can be read.

    Read are 64 bytes of each weight, and of each square block of one. Left out is what has no values or is no plain
    floating-point tensor, as weights of GGUF files are, and what does not vary.
    """
    read = _read(weights)
    ascending, kept = 0, read[_telling(read, 0)]
    while len(kept) > _MOST_SAMPLES and 2 * ascending < SAMPLE_LENGTH:
        ascending += 1
        kept = kept[_telling(kept, ascending)]
    if not len(kept):
        return {}
    return {"ascending": ascending, "samples": [[_digits(n) for n in each] for each in sorted(kept.tolist())]}


def _digits(number: float) -> float:
    """What float32 holds, in as few digits as bring it back."""
    return float(f"{number:.9g}")


def _read(weights: Iterable[Tensor]) -> Tensor:
    """All samples, float32, on the CPU. Every look at a GPU's memory waits for it, so there is only one."""
    samples: dict[torch.device, list[Tensor]] = {}
    for weight in weights:
        for sample in _samples(weight):
            samples.setdefault(sample.device, []).append(sample)
    return torch.cat([torch.empty(0, SAMPLE_LENGTH), *(torch.stack(each).cpu() for each in samples.values())])


def _samples(weight: Tensor) -> list[Tensor]:
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.is_floating_point()
    if not plain or weight.is_meta or weight.numel() < SAMPLE_LENGTH:
        return []
    try:
        rows = weight.detach() if weight.ndim > 1 else weight.detach().unsqueeze(0)
        width = rows[0].numel()
        if width < SAMPLE_LENGTH:
            return []
        starts = range(0, len(rows), width) if len(rows) % width == 0 else range(1)
        return [rows[i].reshape(-1)[:SAMPLE_LENGTH].float() for i in starts[:_MOST_BLOCKS]]
    except (RuntimeError, TypeError):  # as a format that its device cannot convert
        return []


def _telling(samples: Tensor, ascending: int) -> Tensor:
    """Which vary, and have a first few pairs of numbers that ascend, ``[S]``."""
    varies = samples.isfinite().all(dim=1) & (samples != samples[:, :1]).any(dim=1)
    firsts = samples[:, : 2 * ascending]
    return varies & (firsts[:, ::2] < firsts[:, 1::2]).all(dim=1)


def same_checkpoint(a: Facts, b: Facts) -> bool | None:
    """Whether two fingerprints are of one checkpoint; None where that cannot be told.

    They are if one has nearly all samples of the other: it may have more, where q, k and v are apart or more can be
    read. Two numbers are the same if the finer of them rounds to the coarser. Weights that were moved by 1 % are
    another checkpoint in fp8, too, where most round to what they were: half as many differences as that makes are
    too many.
    """
    if not a.get("samples") or not b.get("samples"):
        return None
    if a == b:  # mostly, and comparing takes 50 ms
        return True
    ascending = max(a.get("ascending", 0), b.get("ascending", 0))
    x, y = (torch.tensor(each["samples"], dtype=torch.float32) for each in (a, b))
    x, y = (each[_telling(each, ascending)] for each in (x, y))
    found = [_look_for(every, among, ascending) for every, among in ((x, y), (y, x))]
    share, differ, moved = max(each for each in found if each) if any(found) else (None, 0, 0)
    return None if share is None else share >= _SAME_SAMPLES and differ <= moved / 2


def _look_for(samples: Tensor, among: Tensor, ascending: int) -> tuple[float, float, float] | None:
    """The share of samples that are found; of their numbers, the share that differs; and if they were moved by 1 %.

    Rounding makes samples that tell nothing of some: those are not looked for.
    """
    for dtype in _FP8:
        samples = samples[_telling(samples.to(dtype).float(), ascending)]
    if not len(samples) or not len(among):
        return None
    same, moved = _compared(samples, among)
    best = same.double().mean(dim=2).max(dim=1)
    found = best.values >= _SAME_NUMBERS
    if not found.any():
        return 0, 1, 0
    there = moved[torch.arange(len(samples)), best.indices][found]
    return float(found.double().mean()), float(1 - best.values[found].mean()), float(there.mean())


def _compared(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For all pairs of samples, number by number, ``[X, Y, n]``.

    Returns:
        Whether they are the same; and how probably weights that were moved by 1 % are not.
    """
    (x_steps, x_formats), (y_steps, y_formats) = _steps_and_formats(x), _steps_and_formats(y)
    coarse, fine = torch.maximum(x_steps[:, None], y_steps), torch.minimum(x_steps[:, None], y_steps)
    one_format = (x_formats[:, None] == y_formats).all(dim=2)[..., None]
    same = (x.double()[:, None] - y.double()).abs() <= torch.where(one_format, 0.0, coarse / 2)
    seen = torch.where(fine < coarse / 4, fine / 2, 0.0)  # a move within the finer format's step is not
    moves = _MOVED * x.double().abs()[:, None] - seen
    return same, (moves / coarse).clamp(0, 1)


def _steps_and_formats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each number the distance to the next that its format holds, ``[X, n]``; of each sample which formats hold it.

    An fp8 file's weights may have been loaded as fp16, so their type does not tell. Small numbers are further apart in
    one fp8 format than in the other: of the formats that hold a sample, the coarsest counts at each number.
    """
    holds = torch.stack([(x.to(dtype).float() == x).all(dim=1) for dtype in _FORMATS], dim=1)
    steps = torch.stack([_step(x, dtype) for dtype in _FORMATS], dim=1)
    return torch.where(holds[..., None], steps, 0.0).amax(dim=1), holds


def _step(x: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return info.eps * torch.exp2(x.double().abs().clamp(min=info.smallest_normal).log2().floor())
