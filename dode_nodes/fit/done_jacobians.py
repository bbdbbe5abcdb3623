"""The Jacobians of a refinement that are done, as they are kept: a refinement that was ended goes on after them.

Kept is where each has led. The network's outputs on the way there are too many: one more run brings them back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..tables.kept import Kept
from .student import Student


class Done(NamedTuple):
    """What one Jacobian has come to.

    Attributes:
        student: the best of its steps.
        damping: that has served.
        evaluations: what that has cost.
    """

    student: Student
    damping: float
    evaluations: int


class DoneJacobians:
    """Those of one refinement, in their order.

    Args:
        kept: where; None for nowhere.
    """

    def __init__(self, kept: Kept | None = None) -> None:
        self._kept = kept
        found = None if kept is None else kept.load()
        self._entries: list[dict[str, Any]] = [] if found is None else found[1]
        self._next = 0

    def next(self, student: Student, damping: float) -> Done | None:
        """What the next one has come to; None where it has not been, or was another student's."""
        if self._next == len(self._entries):
            return None
        entry = self._entries[self._next]
        if entry["before"] != _numbers(student, damping):
            del self._entries[self._next :]
            return None
        self._next += 1
        after = entry["after"]
        sigmas, corrections = (np.array(after[name]) for name in ("sigmas", "corrections"))
        moved = replace(student, sigmas=sigmas, corrections=corrections)
        return Done(moved, after["damping"], entry["evaluations"])

    def add(self, before: Student, damping: float, done: Done) -> None:
        """Note what the next one has come to, from a student and a damping."""
        if self._kept is None:
            return
        after = _numbers(done.student, done.damping)
        entry = {"before": _numbers(before, damping), "after": after, "evaluations": done.evaluations}
        self._entries.append(entry)
        self._next = len(self._entries)
        self._kept.save({}, self._entries)


def _numbers(student: Student, damping: float) -> dict[str, Any]:
    """All that a Jacobian moves."""
    return {
        "sigmas": student.sigmas.tolist(),
        "corrections": student.corrections.tolist(),
        "damping": float(damping),
    }
