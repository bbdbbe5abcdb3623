"""Noise levels: what a schedule must be, and when two σ are equal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .errors import DodeError

HOST_RTOL = 1e-4
"""Two σ within this are one: hosts compute the same schedule in float32, each in its own way."""

_ROUNDING_RTOL = 1e-5


def same_sigma(a: float, b: float) -> bool:
    """Whether two σ are one, though two programs have computed them."""
    return math.isclose(a, b, rel_tol=HOST_RTOL)


def equal_sigma(a: float, b: float) -> bool:
    """Whether two σ that follow from one schedule are one, to float32's rounding."""
    return math.isclose(a, b, rel_tol=_ROUNDING_RTOL)


def distinct(sigmas: Iterable[float]) -> list[float]:
    """Descending; of equal ones the highest."""
    kept: list[float] = []
    for sigma in sorted(sigmas, reverse=True):
        if not kept or not equal_sigma(sigma, kept[-1]):
            kept.append(sigma)
    return kept


def check_sigmas(sigmas: Tensor) -> None:
    """Refuse what is not a descending schedule of finite σ ≥ 0 with one step at least."""
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or not sigmas.is_floating_point():
        raise DodeError("sigmas must be a one-dimensional tensor of floating-point numbers")
    if len(sigmas) < 2:
        raise DodeError(f"sigmas needs at least two entries (one step), not {len(sigmas)}")
    values = sigmas.tolist()
    if not all(math.isfinite(s) and s >= 0 for s in values):
        raise DodeError(f"sigmas must be finite and not negative, got {values}")
    for i, (a, b) in enumerate(pairwise(values)):
        if b >= a:
            what = "is repeated" if a == b else "ascends"
            raise DodeError(f"sigmas must descend, but σ {what} at {i} → {i + 1}: {a:.6g}, {b:.6g}")


def check_schedules(schedules: Sequence[Tensor]) -> None:
    """Refuse students' schedules that do not all descend from one σ to 0."""
    if not schedules:
        raise DodeError("give at least one schedule: the sigmas of a student")
    for sigmas in schedules:
        check_sigmas(sigmas)
        if sigmas[-1] != 0:
            raise DodeError(f"a schedule to distil must end at σ = 0, not at {float(sigmas[-1]):.6g}")
    starts = [float(sigmas[0]) for sigmas in schedules]
    if not all(equal_sigma(start, starts[0]) for start in starts):
        raise DodeError(f"the schedules must start at the same σ, not at {starts}")


def at_least_float32(sigmas: Tensor) -> Tensor:
    """A schedule that a grid can be cut from: half precision could not tell its σ apart."""
    return sigmas.to(torch.promote_types(sigmas.dtype, torch.float32))


def is_flow(sigmas: Tensor | np.ndarray) -> bool:
    """Flow models begin at σ ≤ 1; no other family's noise is that low."""
    return float(sigmas[0]) <= 1
