"""Tells whether two models are the same checkpoint, even if their weights have different number formats."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...tables.gate import Facts

_SAMPLED_TENSORS = 48
_PLACE = 0.382
_MORE_PLACES = (0.07, 0.19, 0.53, 0.71, 0.93)
_COMPILED = "_orig_mod."
_FORMATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""From fine to coarse."""
_EQUAL_SHARE = 0.97
"""Weights that were moved by 1 % and rounded to fp8 agree in nine of ten."""
_FEW_EQUAL_SHARE, _FEW_RTOL = 0.9, 0.01
"""For fingerprints of version 0.1's first tables: 48 numbers of five digits."""


def fingerprint(model: ModelPatcher) -> dict[str, Any]:
    """Some weights, and a hash of all names and shapes.

    Where a patch (LoRA) is applied, the weight beneath it is read. A weight that cannot be read, as those of GGUF
    files, is None; nothing at all can be read of some models.
    """
    try:
        state = model.model_state_dict(filter_prefix="diffusion_model.")
    except Exception as error:  # whatever another pack's model makes of it
        logging.warning("D-ODE: the weights of this model cannot be read: %s", error)
        return {}
    weights = {name.replace(_COMPILED, ""): weight for name, weight in sorted(state.items())}
    layout = "\n".join(f"{name} {list(weight.shape)}" for name, weight in weights.items())
    large = [name for name, weight in weights.items() if weight.ndim >= 2]
    stride = max(1, len(large) // _SAMPLED_TENSORS)
    sampled = [_beneath_patches(model, name, weights[name]) for name in large[::stride][:_SAMPLED_TENSORS]]
    read = [_read(weight) for weight in sampled]
    return {
        "layout": hashlib.sha256(layout.encode()).hexdigest()[:16],
        "values": [first for first, *_ in read],
        "more_values": [number for _, *more in read for number in more],
    }


def _beneath_patches(model: ModelPatcher, name: str, weight: torch.Tensor) -> torch.Tensor:
    kept: torch.Tensor = model.backup[name].weight if name in model.backup else weight
    return kept


def _read(weight: torch.Tensor) -> list[float | None]:
    """A weight's numbers at the places, read in one go: each look at a GPU's memory waits for it."""
    places = [_PLACE, *_MORE_PLACES]
    try:
        flat = weight.detach().reshape(-1)
        numbers = torch.stack([flat[int(len(flat) * place)] for place in places]).float().tolist()
    except (RuntimeError, NotImplementedError):  # a meta tensor, or a class of its own
        return [None] * len(places)
    return [float(f"{number:.9g}") for number in numbers]


def same_checkpoint(a: Facts, b: Facts) -> bool | None:
    """Whether two fingerprints are of one checkpoint; None where that cannot be told.

    Both are rounded to the coarser of their number formats, then compared number by number.
    """
    if not a.get("layout") or not b.get("layout"):
        return None
    pairs = _readable_pairs(a, b)
    if not pairs:
        return None
    if a["layout"] != b["layout"]:
        return False
    x, y = (torch.tensor(numbers, dtype=torch.float32) for numbers in zip(*pairs, strict=True))
    coarse = max(_format_of(x), _format_of(y), key=_FORMATS.index)
    x, y = (numbers.to(coarse).double() for numbers in (x, y))
    many = "more_values" in a and "more_values" in b
    rtol, least = (0.0, _EQUAL_SHARE) if many else (_FEW_RTOL, _FEW_EQUAL_SHARE)
    equal = (x - y).abs() <= rtol * torch.maximum(x.abs(), y.abs())
    return float(equal.double().mean()) >= least


def _format_of(values: torch.Tensor) -> torch.dtype:
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
