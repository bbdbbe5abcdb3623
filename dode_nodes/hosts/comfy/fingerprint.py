"""Whether two models are one checkpoint, whatever number format its weights are kept in."""

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
_DIGITS_RTOL = 2e-5  # of numbers with five digits
_EQUAL_SHARE = 0.97
"""Weights that were moved by 1 % and rounded to fp8 agree in nine of ten."""
_FORMATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
"""From fine to coarse."""


def fingerprint(model: ModelPatcher) -> dict[str, Any]:
    """Some weights, their number format, and a hash of all names and shapes.

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
    return {
        "layout": hashlib.sha256(layout.encode()).hexdigest()[:16],
        "format": _coarsest(str(weight.dtype).removeprefix("torch.") for weight in sampled),
        "values": [_value(weight, _PLACE) for weight in sampled],
        "more_values": [_value(weight, place) for weight in sampled for place in _MORE_PLACES],
    }


def _beneath_patches(model: ModelPatcher, name: str, weight: torch.Tensor) -> torch.Tensor:
    kept: torch.Tensor = model.backup[name].weight if name in model.backup else weight
    return kept


def _value(weight: torch.Tensor, place: float) -> float | None:
    try:
        flat = weight.detach().reshape(-1)
        return float(f"{float(flat[int(len(flat) * place)]):.5g}")
    except (RuntimeError, NotImplementedError):  # a meta tensor, or a class of its own
        return None


def _coarsest(formats: Any) -> str:
    known = [name for name in formats if name in _FORMATS]
    return max(known, key=_FORMATS.index, default="float32")


def same_checkpoint(a: Facts, b: Facts) -> bool | None:
    """Whether two fingerprints are of one checkpoint; None where that cannot be told.

    Both are rounded to the coarser of their formats, then compared number by number.
    """
    if not a.get("layout") or not b.get("layout"):
        return None
    pairs = _readable_pairs(a, b)
    if a["layout"] != b["layout"]:
        return False if pairs else None
    if not pairs:
        return None
    coarse = _coarsest((a.get("format", "float16"), b.get("format", "float16")))
    x, y = (torch.tensor(numbers, dtype=torch.float64) for numbers in zip(*pairs, strict=True))
    if coarse not in ("float32", "float64"):
        dtype = getattr(torch, coarse)
        x, y = (numbers.float().to(dtype).double() for numbers in (x, y))
    equal = (x - y).abs() <= _DIGITS_RTOL * torch.maximum(x.abs(), y.abs())
    return float(equal.double().mean()) >= _EQUAL_SHARE


def _readable_pairs(a: Facts, b: Facts) -> list[tuple[float, float]]:
    pairs: list[tuple[float, float]] = []
    for name in ("values", "more_values"):
        mine, theirs = a.get(name, []), b.get(name, [])
        if len(mine) == len(theirs):
            pairs += [(x, y) for x, y in zip(mine, theirs, strict=True) if x is not None and y is not None]
    return pairs
