"""Where a row comes from and how good it is, as data. This decides which row is sampled, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np

from ..errors import DodeError
from .gate import (
    Facts,
    check_schedule,
    finite,
    is_count,
    is_hexadecimal,
    is_line,
    is_name,
    is_number,
    is_text,
    numbers,
    shortened,
)
from .solver_options import checked_options

Part = TypeVar("Part")

_is_sha256 = is_hexadecimal(64)
_DATE = re.compile(r"[0-9]{4}-[0-1][0-9]-[0-3][0-9]")

DISTILLED, REFINED, PLAIN = "distilled", "refined", "plain"
KINDS = (DISTILLED, REFINED, PLAIN)
_OWN = 0.8
"""Of the distance to the teacher's other pictures: what is farther from its own is not its own. Without any
correspondence it is 1."""

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
            raise DodeError(f"a row's origin must be one of {KINDS}, not {shortened(self.kind)}")
        if (self.solver is None) != (self.sigmas is None):
            raise DodeError(
                "an origin must have both the solver and the sigmas of the row before refining, or neither"
            )
        if self.solver is not None and not is_name(self.solver):
            raise DodeError("an origin's solver must be a name")
        options = checked_options(self.solver or "", self.solver_options, "an origin's options")
        object.__setattr__(self, "solver_options", options)
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
class Distances:
    """Distances to the teacher's ends (RMS, in the latent) over some latents.

    Attributes:
        rms: root of the mean square of them.
        median: of them.
        low, high: a tenth of the latents are nearer than ``low``, a tenth are farther than ``high``.
    """

    rms: float
    median: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not all(is_number(value) and value >= 0 for value in vars(self).values()):
            raise DodeError("distances must be numbers of at least 0")

    @classmethod
    def over(cls, distances: np.ndarray) -> Distances:
        """Of one for each latent, ``[n]``."""
        low, median, high = np.quantile(distances, (0.1, 0.5, 0.9)).tolist()
        return cls(float(np.sqrt(np.square(distances).mean())), median, low, high)


@dataclass(frozen=True)
class Unseen:
    """How a row does on latents that nothing was fitted or chosen on.

    Attributes:
        latents: how many.
        dode: the row's distances.
        stock: those of the best stock setting, or of the plain solver where none was looked for.
        nearer: the share of the latents that the row brings nearer than stock.
        stock_needs: with how many evaluations the stock setting comes as near; one more than twice the row's where
            it does not by then. None where that was not looked for.
        to_others: of a row that follows another model's pictures: its RMS distance to where the teacher ends from the
            other noises of the same prompt. None where the teacher is the model itself, or a prompt has one noise.
    """

    latents: int
    dode: Distances
    stock: Distances
    nearer: float
    stock_needs: int | None = None
    to_others: float | None = None

    def __post_init__(self) -> None:
        for name in ("dode", "stock"):
            if not isinstance(of := getattr(self, name), Distances):
                object.__setattr__(self, name, read(Distances, of, f"'unseen': '{name}'"))
        if not is_count(self.latents) or self.latents < 1:
            raise DodeError("'unseen' needs the number of latents it was measured on")
        if not is_number(self.nearer) or not 0 <= self.nearer <= 1:
            raise DodeError("'unseen': 'nearer' must be a number from 0 to 1")
        if self.stock_needs is not None and (not is_count(self.stock_needs) or self.stock_needs < 1):
            raise DodeError("'unseen': 'stock_needs' must be a number of evaluations")
        if self.to_others is not None and (not is_number(self.to_others) or self.to_others < 0):
            raise DodeError("'unseen': 'to_others' must be a number of at least 0")

    @property
    def corresponds(self) -> bool:
        """Whether row and teacher make one picture of one noise. Where they do not, distances between them mean
        nothing."""
        return self.to_others is None or self.dode.rms < _OWN * self.to_others

    def to_json(self) -> dict[str, Any]:
        """What is known."""
        return _known(self)


@dataclass(frozen=True)
class StockSetting:
    """The best that a search over stock samplers found for this model at as many evaluations.

    Attributes:
        sampler, scheduler: as a host's drop-downs name them.
        error: its RMS distance to the teacher's end.
        latents: how many that was measured on.
        discard_penultimate: whether the schedule lacks its σ before 0.
        tried: the best of how many settings it is; None where that is not known.
    """

    sampler: str
    scheduler: str
    error: float
    latents: int
    discard_penultimate: bool = False
    tried: int | None = None

    def __post_init__(self) -> None:
        if not is_name(self.sampler) or not is_name(self.scheduler):
            raise DodeError("a stock setting needs the names of a sampler and a scheduler")
        if not is_number(self.error) or self.error < 0 or not is_count(self.latents) or self.latents < 1:
            raise DodeError("a stock setting needs an error and the number of latents it was measured on")
        if not isinstance(self.discard_penultimate, bool):
            raise DodeError("a stock setting's discard_penultimate must be true or false")
        if self.tried is not None and (not is_count(self.tried) or self.tried < 1):
            raise DodeError("a stock setting's 'tried' must be a number of settings")

    def solver_and_options(self) -> tuple[str, Facts]:
        """The sampler's name, and its options.

        Raises:
            DodeError: they are none that it is known to take.
        """
        solver, *options = self.sampler.split(", ")
        pairs = [option.rsplit(" ", 1) for option in options]
        try:
            values = {name: float(value) if "." in value else int(value) for name, value in pairs}
        except ValueError:  # a name that a stranger has written
            raise DodeError(f"a stock setting's options are no numbers: {shortened(self.sampler)}") from None
        return solver, checked_options(solver, values, "a stock setting's options")

    def to_json(self) -> dict[str, Any]:
        """What is known."""
        return _known(self)


@dataclass(frozen=True)
class Credit:
    """Whose a row is; for people.

    Attributes:
        author, licence: a few words each.
        notes: what else there is to say, in lines.
        date: when the row was made, as 2026-01-31.
    """

    author: str = ""
    licence: str = ""
    notes: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        if not is_line(self.author) or not is_line(self.licence) or not is_text(self.notes):
            raise DodeError(
                "author and licence must be a line each, and notes text, with no control characters"
            )
        if self.date and not (isinstance(self.date, str) and _DATE.fullmatch(self.date)):
            raise DodeError("a date must be written as 2026-01-31")

    def to_json(self) -> dict[str, Any]:
        """What there is."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name))}


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
        if not _is_sha256(self.sha256):
            raise DodeError("a LoRA needs the SHA-256 of its weights, 64 hexadecimal digits in lower case")
        if not is_number(self.strength) or not is_line(self.name):
            raise DodeError("a LoRA's strength must be a number and its name must be text")

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class TrainedLora:
    """The LoRA that was trained for a row, to go on the model while the row samples. Without it the row is as it was.

    Attributes:
        content: what it is known by, whoever saved it (`lora_file.content_hash`), 64 hexadecimal digits.
        strength: at which it did best on the latents held out.
        error: of the row with it there, RMS distance to the teacher's end.
        error_without: of the row alone, on the same latents.
        latents: how many.
        name: what its file was called; for people.
    """

    content: str
    strength: float
    error: float
    error_without: float
    latents: int
    name: str = ""

    def __post_init__(self) -> None:
        if not _is_sha256(self.content):
            raise DodeError(
                "'trained_lora' needs the hash of its numbers, 64 hexadecimal digits in lower case"
            )
        if not is_number(self.strength) or not is_line(self.name):
            raise DodeError("'trained_lora': 'strength' must be a number, and 'name' text")
        if not all(is_number(error) and error >= 0 for error in (self.error, self.error_without)):
            raise DodeError("'trained_lora': 'error' and 'error_without' must be numbers of at least 0")
        if not is_count(self.latents) or self.latents < 1:
            raise DodeError("'trained_lora' needs the number of latents that it was measured on")

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def _known(part: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(part).items() if value is not None}


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
