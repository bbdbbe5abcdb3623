"""A λ table: one model's rows, and its file."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DodeError, TableError
from . import gate, migration, publish, safefile
from .gate import Facts
from .names import SUFFIX
from .row import LambdaRow, Match, check_features, same_arrays, shown_hash

FORMAT = "dode-lambda-table"
VERSION = 2
"""Of the file's layout. docs/table-format.md describes it."""
MAX_ROWS = 1_000
_MOST_SHOWN = 12


@dataclass(frozen=True, eq=False)
class LambdaTable:
    """One model's rows, and what is known of the model.

    Attributes:
        rows: at least one.
        model: facts about the model (family, prediction type, channels, fingerprint, …).
        unknown: optional fields of a later version; kept, and saved again.
        unknown_arrays: the same, of numbers.
        name: what its file is called, without the ending; for people. The file does not hold it.
    """

    rows: Sequence[LambdaRow]
    model: Facts = field(default_factory=dict)
    unknown: Facts = field(default_factory=dict)
    unknown_arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        rows = tuple(self.rows) if isinstance(self.rows, Sequence) else ()
        if not rows or not all(isinstance(row, LambdaRow) for row in rows):
            raise DodeError("a λ table needs a list of at least one LambdaRow")
        if len(rows) > MAX_ROWS:
            raise DodeError(f"a λ table has at most {MAX_ROWS} rows, not {len(rows)}")
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "model", gate.checked(self.model, gate.MODEL, "model"))
        object.__setattr__(self, "unknown", gate.json_object(self.unknown, "unknown"))
        object.__setattr__(self, "unknown_arrays", gate.foreign_arrays(self.unknown_arrays))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LambdaTable):
            return NotImplemented
        mine, theirs = ((t.rows, t.model, t.unknown) for t in (self, other))
        return mine == theirs and same_arrays(self.unknown_arrays, other.unknown_arrays)

    __hash__ = None  # type: ignore[assignment]  # arrays inside

    def __reduce__(self) -> tuple[Any, ...]:
        whole = (self.rows, dict(self.model), dict(self.unknown), dict(self.unknown_arrays), self.name)
        return LambdaTable, whole

    @property
    def sha256(self) -> str:
        """Of all that sampling uses, in hexadecimal; the rows' order counts, for it breaks ties."""
        return hashlib.sha256("".join(row.sha256 for row in self.rows).encode()).hexdigest()

    def match(self, sigmas: Tensor | Sequence[float], solver: str | None = None) -> Match:
        """The row for a schedule or a part of one.

        Where several rows fit, one whose whole schedule this is goes before one that has it as a part;
        then the one with the smallest held-out error from that start is taken, among equals the first. Of a part,
        a row's plain solver is taken where it was found to be nearer from that start.

        Args:
            sigmas: what is to be sampled, descending.
            solver: only rows that serve this solver.
        """
        candidates = [row for row in self.rows if solver is None or row.serves(solver)]
        if not candidates:
            return Match(
                None, 0, f"this λ table has no row for the solver '{solver}'. It has: {self.contents()}"
            )
        matches = [row.find(sigmas) for row in candidates]
        fitting = [(match.row, match) for match in matches if match.row is not None]
        parts = (plain.find(sigmas) for plain in plain_rows(candidates))
        fitting += [(part.row, part) for part in parts if part.row is not None and part.step]
        if fitting:
            best = min(fitting, key=lambda m: (len(m[0].sigmas) != len(sigmas), m[0].error_from(m[1].step)))
            return best[1]
        why = matches[0].why if len(matches) == 1 else "no row's schedule contains these σ"
        return Match(None, 0, f"{why}. The table has: {self.contents()}")

    def contents(self) -> str:
        """The rows, in words; of many, the first."""
        labels = [row.label for row in self.rows[:_MOST_SHOWN]]
        more = len(self.rows) - len(labels)
        return "; ".join([*labels, f"and {more} more"] if more else labels)

    @property
    def called(self) -> str:
        """What people are told of which table this is: its name, and what the numbers are known by, once."""
        digits = shown_hash(self.sha256)
        return self.name if digits in self.name else f"{self.name} {digits}".strip()

    def named(self, name: str) -> str:
        """A file's name, without its ending, with digits that the numbers are known by: NAME-1a2b3c4d."""
        return f"{name}-{shown_hash(self.sha256)}"

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the table as ``.safetensors``, whole or not at all.

        Raises:
            NameTaken: the file exists, and ``overwrite`` is false.
            TableError: the name does not end so, or it cannot be written; says what to do.
        """
        path = Path(path)
        _check_suffix(path)
        tensors = dict(self.unknown_arrays) | _named([row.arrays() for row in self.rows])
        metadata = {"format": FORMAT, "version": str(VERSION), "table": json.dumps(self._facts())}
        safefile.write(path, tensors, metadata, overwrite=overwrite)
        return path

    def _facts(self) -> dict[str, Any]:
        """Everything but the arrays."""
        rows = [row.to_json() for row in self.rows]
        return dict(self.unknown) | {"model": dict(self.model), "rows": rows}

    def to_json(self) -> dict[str, Any]:
        """The table for a host that keeps JSON: what a file has, its arrays as nested lists.

        Arrays that this version knows nothing about are left out.
        """
        arrays = _named([row.own_arrays for row in self.rows])
        return {
            "format": FORMAT,
            "version": VERSION,
            "table": self._facts(),
            "arrays": {name: array.tolist() for name, array in arrays.items()},
        }

    @classmethod
    def from_json(cls, facts: Any) -> LambdaTable:
        """The inverse of ``to_json``. It may come from a stranger, as a file may: the same gate.

        Raises:
            TableError: saying what is wrong with it.
        """
        try:
            if not isinstance(facts, Mapping) or facts.get("format") != FORMAT:
                raise DodeError("it does not have the format of one")
            whole = gate.json_object(facts, "the table")
            arrays = whole.get("arrays")
            if not isinstance(arrays, dict):
                raise DodeError("it has no arrays")
            numbers = {name: gate.numbers(array, name) for name, array in arrays.items()}
            return cls._from_json(
                _version({"version": str(whole.get("version"))}), whole.get("table"), numbers, ""
            )
        except DodeError as error:
            raise TableError(f"the λ table: {error}") from error

    @staticmethod
    def check_new(path: Path) -> None:
        """That ``save`` can write a new table here: to know before the work. A missing folder is made.

        Raises:
            TableError: as ``save`` would.
        """
        _check_suffix(path)
        publish.check_new(path)

    @classmethod
    def load(cls, path: str | Path) -> LambdaTable:
        """Read a table. No file can run code, hang, or fill memory.

        Raises:
            TableError: naming the file and what is wrong with it.
        """
        path = Path(path)
        tensors, metadata = safefile.read(path)
        try:
            return cls._from_contents(tensors, metadata, path.stem)
        except DodeError as error:
            raise TableError(f"{path}: {error}") from error

    @classmethod
    def from_bytes(cls, content: bytes) -> LambdaTable:
        """Read a table from a file's bytes.

        Raises:
            TableError: saying what is wrong with them.
        """
        tensors, metadata = safefile.contents(io.BytesIO(content), len(content))
        try:
            return cls._from_contents(tensors, metadata, "")
        except DodeError as error:
            raise TableError(str(error)) from error

    @classmethod
    def _from_contents(
        cls, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], name: str
    ) -> LambdaTable:
        if metadata.get("format") != FORMAT:
            raise DodeError("a safetensors file, but not a λ table")
        return cls._from_json(_version(metadata), _facts(metadata.get("table", "")), tensors, name)

    @classmethod
    def _from_json(
        cls, version: int, facts: Any, tensors: Mapping[str, np.ndarray], name: str
    ) -> LambdaTable:
        if not isinstance(facts, dict) or not isinstance(facts.get("rows"), list):
            raise DodeError("its metadata has no rows")
        if len(facts["rows"]) > MAX_ROWS:  # before any is made
            raise DodeError(f"a λ table has at most {MAX_ROWS} rows, not {len(facts['rows'])}")
        check_features(facts.pop("requires", []))
        rows, model = facts.pop("rows"), facts.pop("model", {})
        arrays, others = _arrays_by_row(tensors, len(rows))
        return cls(
            rows=[_row(i, version, row, arrays[i]) for i, row in enumerate(rows)],
            model=model,
            unknown=facts,
            unknown_arrays=others,
            name=name,
        )


def _named(arrays: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The rows' arrays as one set; the inverse of ``_arrays_by_row``."""
    return {f"rows.{i}.{name}": array for i, of_row in enumerate(arrays) for name, array in of_row.items()}


def _facts(text: str) -> Any:
    try:
        return safefile.parse_json(text)
    except TableError as error:
        raise TableError(f"its metadata is {error}") from error


def _version(metadata: Mapping[str, str]) -> int:
    text = metadata.get("version", "")
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise DodeError("its version is not a number")
    if int(text) > VERSION:
        raise DodeError(f"it has version {text}, and this pack reads up to {VERSION}: update the pack")
    return int(text)


def _row(i: int, version: int, facts: Any, arrays: Mapping[str, np.ndarray]) -> LambdaRow:
    try:
        if not isinstance(facts, dict):
            raise DodeError("it is not an object")
        return LambdaRow.from_json(migration.to_current(facts, version), arrays)
    except DodeError as error:
        raise DodeError(f"row {i}: {error}") from error


def _arrays_by_row(
    tensors: Mapping[str, np.ndarray], rows: int
) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Each row's arrays by their names in it, and all others by their whole names."""
    of_rows: list[dict[str, np.ndarray]] = [{} for _ in range(rows)]
    places = {f"rows.{i}": arrays for i, arrays in enumerate(of_rows)}
    others: dict[str, np.ndarray] = {}
    for whole, array in tensors.items():
        *row, name = whole.split(".", 2)  # a name in a row may have dots of its own
        own = places.get(".".join(row))
        if own is None:
            others[whole] = array
        else:
            own[name] = array
    return of_rows, others


def plain_rows(rows: Iterable[LambdaRow]) -> list[LambdaRow]:
    """The plain solvers of rows, as rows, where they were measured from later starts, too."""
    return [row.plain for row in rows if row.errors is not None and row.errors.later_stock]


def _check_suffix(path: Path) -> None:
    if path.suffix != SUFFIX:
        raise TableError(f"{path}: a table's file name ends in .safetensors")
