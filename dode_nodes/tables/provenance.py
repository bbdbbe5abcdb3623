"""Where a row comes from and how good it is, as data. This decides which row is sampled, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np

from ..errors import DodeError
from .gate import Facts, check_schedule, finite, is_count, is_name, is_number, is_text, json_object, numbers

Part = TypeVar("Part")

DISTILLED, REFINED, PLAIN = "distilled", "refined", "plain"
KINDS = (DISTILLED, REFINED, PLAIN)

ROW_GIVEN, PLAIN_SOLVER, IPNDM = "row given", "plain solver", "iPNDM-3"
"""What a refinement may begin with, as reports name it."""


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a row's numbers come from.

    Attributes:
        kind: ``"distilled"``: λ found step by step; ``"refined"``: all numbers fitted end to end;
            ``"plain"``: the stock solver, which a fit could not beat.
        solver, solver_options, sigmas: what a refinement began with; None for the row's own.
    """

    kind: str = DISTILLED
    solver: str | None = None
    solver_options: Facts = field(default_factory=dict)
    sigmas: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DodeError(f"a row's origin must be one of {KINDS}, not {self.kind!r}")
        if (self.solver is None) != (self.sigmas is None):
            raise DodeError(
                "an origin must have both the solver and the sigmas of the row before refining, or neither"
            )
        if self.solver is not None and not is_name(self.solver):
            raise DodeError("an origin's solver must be a name")
        object.__setattr__(self, "solver_options", json_object(self.solver_options, "an origin's options"))
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", numbers(self.sigmas, "an origin's sigmas"))
            check_schedule(self.sigmas, "an origin's sigmas")

    def to_json(self) -> dict[str, Any]:
        """Without what is not known."""
        if self.sigmas is None:
            return {"kind": self.kind}
        options = {"solver_options": dict(self.solver_options)} if self.solver_options else {}
        return {"kind": self.kind, "solver": self.solver, **options, "sigmas": self.sigmas.tolist()}


@dataclass(frozen=True)
class HeldOutErrors:
    """Distances to the teacher's end (RMS, in the latent), on latents that nothing was fitted on.

    Attributes:
        latents: how many.
        dode: for every step, of a run that begins there from the teacher's state; the first is of the whole.
            None where no run can begin, or where it was not measured.
        stock: of the plain solver, over the whole; None where it was not measured.
        later_stock: the same as ``dode`` for the plain solver and its own schedule, from its second step on;
            empty where none was measured.
    """

    latents: int
    dode: tuple[float | None, ...]
    stock: float | None = None
    later_stock: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dode", tuple(self.dode))
        object.__setattr__(self, "later_stock", tuple(self.later_stock))
        values = [value for value in (*self.dode, self.stock, *self.later_stock) if value is not None]
        if not is_count(self.latents) or self.latents < 1:
            raise DodeError("held-out errors need the number of latents they were measured on")
        if not all(is_number(value) and value >= 0 for value in values):
            raise DodeError("held-out errors must be numbers of at least 0")

    @classmethod
    def of_whole(cls, latents: int, steps: int, dode: float | None, stock: float | None) -> HeldOutErrors:
        """Of whole runs; none from later steps was measured. An error that is not finite is not kept."""
        return cls(latents, (finite(dode), *[None] * (steps - 1)), finite(stock))

    @property
    def of_plain(self) -> HeldOutErrors | None:
        """The plain solver's own, as far as they were measured."""
        if not self.later_stock:
            return None
        return HeldOutErrors(self.latents, (self.stock, *self.later_stock), self.stock)

    def to_json(self) -> dict[str, Any]:
        """All fields; of what may be empty only what there is."""
        later = {"later_stock": list(self.later_stock)} if self.later_stock else {}
        return {"latents": self.latents, "dode": list(self.dode), "stock": self.stock} | later


@dataclass(frozen=True)
class StockSetting:
    """The best that a search over stock samplers found for this model at as many evaluations.

    Attributes:
        sampler, scheduler: as a host's drop-downs name them.
        error: its RMS distance to the teacher's end.
        latents: how many that was measured on.
        discard_penultimate: whether the schedule lacks its σ before 0.
    """

    sampler: str
    scheduler: str
    error: float
    latents: int
    discard_penultimate: bool = False

    def __post_init__(self) -> None:
        if not is_name(self.sampler) or not is_name(self.scheduler):
            raise DodeError("a stock setting needs the names of a sampler and a scheduler")
        if not is_number(self.error) or self.error < 0 or not is_count(self.latents) or self.latents < 1:
            raise DodeError("a stock setting needs an error and the number of latents it was measured on")
        if not isinstance(self.discard_penultimate, bool):
            raise DodeError("a stock setting's discard_penultimate must be true or false")

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class Lora:
    """A LoRA that was on the model, known by its content.

    Attributes:
        sha256: of its weights, 64 hexadecimal digits.
        strength: that it was applied with.
        name: what its file was called; for people.
    """

    sha256: str
    strength: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        digits = isinstance(self.sha256, str) and len(self.sha256) == 64
        if not digits or set(self.sha256) - set("0123456789abcdef"):
            raise DodeError("a LoRA needs the SHA-256 of its weights, 64 hexadecimal digits in lower case")
        if not is_number(self.strength) or not is_text(self.name):
            raise DodeError("a LoRA's strength must be a number and its name must be text")

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def read(part: type[Part], facts: Any, what: str) -> Part:
    """One of these from JSON; fields that this version does not know are left out.

    Raises:
        DodeError: it is no object, lacks a field, or a field is invalid.
    """
    if not isinstance(facts, Mapping):
        raise DodeError(f"{what} must be an object")
    known = {each.name for each in fields(part)}  # type: ignore[arg-type]
    try:
        return part(**{name: value for name, value in facts.items() if name in known})
    except TypeError as error:
        raise DodeError(f"{what}: {error}") from error
