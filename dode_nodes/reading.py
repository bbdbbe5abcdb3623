"""Reading a row's report, which is anybody's words: what is missing or odd is None, or left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

GIVEN, PLAIN, IPNDM = "row given", "plain solver", "iPNDM-3"
"""What a refinement may begin with, as its report calls it."""


class Stage(NamedTuple):
    """A student that a refinement came by.

    Attributes:
        name: what it was: one to begin with, or the one after a Jacobian.
        fitted_error, held_out_error: its RMS distance to the teacher at the end.
        evaluations: of one latent each, spent by then.
    """

    name: str
    fitted_error: float | None
    held_out_error: float | None
    evaluations: int | None


class Refinement(NamedTuple):
    """How a row was refined.

    Attributes:
        kept: the name of the stage that the row is.
        began: the solver, solver_options and sigmas that it began with; any of them may be missing.
        stages: all of them, in their order.
        interrupted: whether it was ended before its time.
    """

    kept: str
    began: Mapping[str, Any]
    stages: tuple[Stage, ...]
    interrupted: bool


def refinement_of(report: Mapping[str, Any]) -> Refinement | None:
    """What a report says of a refinement; None where it says nothing of one."""
    kept = at(report, "refined", "kept")
    if not isinstance(kept, str):
        return None
    began, stages = (at(report, "refined", name) for name in ("from", "stages"))
    return Refinement(
        kept=kept,
        began=began if isinstance(began, Mapping) else {},
        stages=tuple(_stage(facts) for facts in stages if isinstance(at(facts, "stage"), str))
        if isinstance(stages, list)
        else (),
        interrupted=at(report, "refined", "interrupted") is True,
    )


def _stage(facts: Mapping[str, Any]) -> Stage:
    numbers = (facts.get(name) for name in Stage._fields[1:])
    return Stage(facts["stage"], *(value if is_number(value) else None for value in numbers))


def at(facts: Any, *names: str) -> Any:
    """What lies at the end of a path of names."""
    for name in names:
        facts = facts.get(name) if isinstance(facts, Mapping) else None
    return facts


def item(values: Any, i: int) -> Any:
    """A list's i-th entry."""
    return values[i] if isinstance(values, list) and i < len(values) else None


def is_number(value: Any) -> bool:
    """Whether it is one that can be formatted: JSON's whole numbers may have thousands of digits."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
