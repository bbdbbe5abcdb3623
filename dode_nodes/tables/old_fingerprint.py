"""Fingerprints as tables had them at first: some weights by name, and a hash of all names and shapes. Only read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .gate import Facts

_SAMPLED_TENSORS = 48
_PLACE = 0.382
_MORE_PLACES = (0.07, 0.19, 0.53, 0.71, 0.93)
_FORMATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""From fine to coarse."""
_EQUAL_SHARE = 0.97
"""Weights that were moved by 1 % and rounded to fp8 agree in nine of ten."""
_FIVE_DIGITS_RTOL = 6e-5
_FEW_EQUAL_SHARE, _FEW_RTOL = 0.9, 0.01
"""For the very first: up to 48 numbers of five digits."""


def is_old(fingerprint: Facts) -> bool:
    """Whether a table's fingerprint is one of these."""
    return "layout" in fingerprint


def is_of(fingerprint: Facts, weights: Mapping[str, Tensor]) -> bool | None:
    """Whether these weights, by ComfyUI's names, are the checkpoint's; None where that cannot be told.

    Both are rounded to the coarser of their number formats, then compared number by number.
    """
    mine = _of(weights)
    pairs = _readable_pairs(fingerprint, mine)
    if not pairs:
        return None
    if fingerprint["layout"] != mine["layout"]:
        return False
    x, y = (torch.tensor(numbers, dtype=torch.float32) for numbers in zip(*pairs, strict=True))
    coarse = max(_format_of(x), _format_of(y), key=_FORMATS.index)
    x, y = (numbers.to(coarse).double() for numbers in (x, y))
    if "more_values" not in fingerprint:
        rtol, least = _FEW_RTOL, _FEW_EQUAL_SHARE
    else:
        rtol, least = _FIVE_DIGITS_RTOL if "format" in fingerprint else 0.0, _EQUAL_SHARE
    equal = (x - y).abs() <= rtol * torch.maximum(x.abs(), y.abs())
    return float(equal.double().mean()) >= least


def _of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    ordered = dict(sorted(weights.items()))
    layout = "\n".join(f"{name} {list(weight.shape)}" for name, weight in ordered.items())
    large = [weight for weight in ordered.values() if weight.ndim >= 2]
    stride = max(1, len(large) // _SAMPLED_TENSORS)
    read = [_read(weight) for weight in large[::stride][:_SAMPLED_TENSORS]]
    return {
        "layout": hashlib.sha256(layout.encode()).hexdigest()[:16],
        "values": [first for first, *_ in read],
        "more_values": [number for _, *more in read for number in more],
    }


def _read(weight: Tensor) -> list[float | None]:
    """A weight's numbers at the places, read in one go: each look at a GPU's memory waits for it."""
    places = [_PLACE, *_MORE_PLACES]
    try:
        flat = weight.detach().reshape(-1)
        numbers: list[float | None] = torch.stack([flat[int(len(flat) * p)] for p in places]).float().tolist()
    except (RuntimeError, NotImplementedError):  # a meta tensor, or a class of its own
        return [None] * len(places)
    return numbers


def _format_of(values: Tensor) -> torch.dtype:
    """The coarsest that holds them all: an fp8 file's weights may have been loaded as fp16."""
    return next(
        (dtype for dtype in reversed(_FORMATS) if torch.equal(values.to(dtype).float(), values)),
        torch.float32,
    )


def _readable_pairs(a: Facts, b: Facts) -> list[tuple[float, float]]:
    pairs: list[tuple[float, float]] = []
    for name in ("values", "more_values"):
        mine, theirs = a.get(name, []), b.get(name, [])
        if len(mine) == len(theirs):
            pairs += [(x, y) for x, y in zip(mine, theirs, strict=True) if x is not None and y is not None]
    return pairs
