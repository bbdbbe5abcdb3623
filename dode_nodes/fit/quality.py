"""One choice instead of many: how much work a fit may be, and what is fitted for it.

Every host offers the same three under the same names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import DodeError


@dataclass(frozen=True)
class Quality:
    """What one of them means.

    Attributes:
        latents: noises to fit on; a quarter of them is held out.
        refine_budget: see ``Recipe``.
        words: what it is, for people.
    """

    latents: int
    refine_budget: float
    words: str

    def count(self, shares: int) -> int:
        """How many noises, where so many groups share them: two for each at least, one to fit and one to check."""
        return max(self.latents, 2 * shares)


QUALITIES = {
    "quick": Quality(8, 0.0, "λ alone, on 8 noises: a few minutes"),
    "good": Quality(16, 4.5, "weights and σ refined, on 16 noises: about 3 times as long as quick"),
    "best": Quality(48, math.inf, "all that pays, on 48 noises: about 50 times as long as quick"),
}
"""Measured in network evaluations at 6 steps: at most 1,600, 5,200 and 86,000 (docs/measurements.md)."""
GOOD = "good"

START_SOLVER = "euler"
"""Where a fit begins if nobody says otherwise: of all solvers it leaves λ the most to do (benchmarks/solvers.py)."""


def start_schedule(*, flow: bool) -> str:
    """The schedule where a fit begins if nobody says otherwise; others enter the race."""
    return "simple" if flow else "karras"


def quality_of(name: str) -> Quality:
    """By its name.

    Raises:
        DodeError: there is no such quality.
    """
    if name not in QUALITIES:
        raise DodeError(f"quality must be one of {', '.join(QUALITIES)}, not '{name}'")
    return QUALITIES[name]
