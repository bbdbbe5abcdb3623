"""Tables made of tables: rows of several together, some of them left out, signed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import DodeError
from . import gate
from .families import family_of
from .fingerprint import same_checkpoint
from .gate import Facts
from .model_check import KINDS
from .provenance import Credit
from .row import LambdaRow
from .table import MAX_ROWS, LambdaTable


def merged(tables: Sequence[LambdaTable]) -> LambdaTable:
    """The rows of tables of one model, each number of them once. What this version does not know is left out.

    Raises:
        DodeError: they are of different models, or there are too many rows.
    """
    first = tables[0].model
    for number, other in enumerate(tables[1:], 2):
        _check_same_model(first, other.model, number)
    rows = {row.sha256: row for table in reversed(tables) for row in reversed(table.rows)}
    kept = [_known(row) for row in reversed(rows.values())]
    if len(kept) > MAX_ROWS:
        raise DodeError(f"together these tables have {len(kept)} rows; a table has at most {MAX_ROWS}")
    return LambdaTable(kept, gate.only_known(first, gate.MODEL), name=tables[0].name)


def chosen(table: LambdaTable, which: str) -> LambdaTable:
    """Only some rows: "1, 3-5", counted from 1, in the order that they are given in; all of them for "".

    Raises:
        DodeError: it says something else, or a row that there is not.
    """
    if not which.strip():
        return table
    return replace(table, rows=[table.rows[number - 1] for number in _numbers(which, len(table.rows))])


def signed(table: LambdaTable, credit: Facts, *, over: bool) -> LambdaTable:
    """With these fields of the credit on every row; ``over`` those that are there, else only where there is none."""
    return replace(table, rows=[replace(row, credit=_credit(row.credit, credit, over)) for row in table.rows])


def with_model_facts(table: LambdaTable, facts: Facts) -> LambdaTable:
    """With other facts of the model."""
    return replace(table, model=dict(table.model) | dict(facts))


def _check_same_model(mine: Facts, theirs: Facts, number: int) -> None:
    for name, words in KINDS:
        a, b = (_plain(name, facts.get(name)) for facts in (mine, theirs))
        if None not in (a, b) and a != b:
            raise DodeError(
                f"merge only tables of one model: the {words} of table {number} is '{b}', that of the first is '{a}'"
            )
    if same_checkpoint(mine.get("fingerprint", {}), theirs.get("fingerprint", {})) is False:
        raise DodeError(
            f"merge only tables of one model: table {number} was made for another checkpoint than the first"
        )


def _plain(name: str, value: Any) -> Any:
    return family_of(value) if name == "family" and value is not None else value


def _known(row: LambdaRow) -> LambdaRow:
    return replace(
        row,
        settings=gate.only_known(row.settings, gate.SETTINGS),
        report=gate.only_known(row.report, gate.REPORT),
        unknown={},
        unknown_arrays={},
    )


def _credit(there: Credit | None, given: Mapping[str, Any], over: bool) -> Credit | None:
    old = {} if there is None else there.to_json()
    new = {name: value for name, value in given.items() if value}
    both = old | new if over else new | old
    return Credit(**both) if both else None


def _numbers(which: str, rows: int) -> list[int]:
    parts = [part for part in re.split(r"[,;\s]+", which.strip()) if part]
    if len(which) > 1_000 or not all(re.fullmatch(r"[0-9]{1,4}(-[0-9]{1,4})?", part) for part in parts):
        raise DodeError(f"give the rows to keep as numbers, such as '1, 3-5', not {gate.shortened(which)}")
    ranges = [[int(end) for end in part.split("-")] for part in parts]
    numbers = list(dict.fromkeys(n for ends in ranges for n in range(ends[0], ends[-1] + 1)))
    if not numbers or min(numbers) < 1 or max(numbers) > rows:
        raise DodeError(f"this table has the rows 1 to {rows}, not {gate.shortened(which)}")
    return numbers
