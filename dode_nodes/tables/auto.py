"""Choosing a table for a model: by what model, guidance and size they are for, never by the errors that files state."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import DodeError
from .choice import NEAR_CFG, NEAR_SIZE, asked_steps, cfg_range
from .families import family_of
from .fingerprint import same_checkpoint
from .gate import Facts
from .model_check import KINDS, compared_patches, same_range
from .row import LambdaRow
from .shelf import Shelf
from .table import LambdaTable
from .trust import Trust

_PIN_DIGITS = 16
_PIN = re.compile(r"(?:(.*) )?([0-9a-f]{16})")

SameCheckpoint = Callable[[Facts], bool | None]
"""Whether a table's fingerprint is the model's; None where that cannot be told."""


@dataclass(frozen=True)
class Wanted:
    """What is to be sampled.

    Attributes:
        model: facts about the model, as a table keeps them; the family by its neutral name.
        steps: that a row must have; None for any.
        solver: that rows must serve; None for any.
        cfg: guidance; None where it is not known.
        size: of a latent along space; None where it is not known.
        family: whether a table of another checkpoint of the family will do.
    """

    model: Facts
    steps: int | None = None
    solver: str | None = None
    cfg: float | None = None
    size: tuple[int, ...] | None = None
    family: bool = True


class Chosen(NamedTuple):
    """A table, and in a line why it is this one."""

    table: LambdaTable
    why: str


class NoTable(DodeError):
    """There is none for what is wanted.

    Attributes:
        distrusted: files that would do, which their user has not picked yet.
    """

    def __init__(self, text: str, distrusted: Sequence[Path]) -> None:
        super().__init__(text)
        self.distrusted = distrusted


class _Ranked(NamedTuple):
    """A table that would do; the smaller the rank, the better. ``checkpoint`` is whether it was made for this one."""

    rank: tuple[float, ...]
    table: LambdaTable
    checkpoint: bool | None


def pin_of(table: LambdaTable) -> str:
    """A table's name and digits of its hash: enough to find it, and no other."""
    return f"{table.name} {table.sha256[:_PIN_DIGITS]}".strip()


def choose(shelf: Shelf, trust: Trust, wanted: Wanted, same: SameCheckpoint | None = None) -> Chosen:
    """The best table for what is wanted.

    Another kind of model excludes a table, and so does another range of σ. Then count, in this order: the checkpoint,
    LoRAs and patches, the shift, guidance, size; among equals, the order of the folders and names.

    Raises:
        NoTable: says what to do.
    """
    same = same or _by_samples(wanted.model)
    ranked: list[_Ranked] = []
    distrusted, lacking = [], []
    for some in shelf.likely(wanted.model, wanted.steps, wanted.solver, wanted.cfg):
        for path, table in some:
            if not _is_possible(table.model, wanted.model):
                continue
            checkpoint = same(table.model.get("fingerprint", {}))
            if checkpoint is not True and not wanted.family:
                continue
            rows = [row for row in table.rows if _serves(row, wanted)]
            if not rows:
                lacking.append(table)
            elif table.sha256 not in trust:
                distrusted.append(path)
            else:
                ranked.append(_Ranked(_rank(table, rows, wanted, checkpoint), table, checkpoint))
        if ranked:
            break
    if not ranked:
        raise NoTable(_nothing(wanted, distrusted, lacking), distrusted)
    _, table, checkpoint = min(ranked, key=lambda each: each.rank)  # the first of equals
    return Chosen(table, _why(table, wanted, checkpoint))


def pinned(shelf: Shelf, trust: Trust, pin: str) -> Chosen:
    """The table that a saved graph was made with, wherever it lies by now.

    Raises:
        DodeError: it is not here, or its user has not picked it yet; says what to do.
    """
    read = _PIN.fullmatch(pin.strip())
    if read is None:
        raise DodeError(
            f"clear 'preset' to choose a table anew: '{pin[:100]}' is not the name of a table and 16 digits"
        )
    name, digits = read[1] or "", read[2]
    found = shelf.by_hash(digits, name)
    if found is not None:
        path, table = found
        if table.sha256 not in trust:
            raise DodeError(_pick_first([path]))
        return Chosen(table, f"λ table {table.called}: this graph is pinned to it")
    raise DodeError(
        f"this graph is pinned to the λ table '{pin.strip()}', which is not in your lambdas folders. Ask its author for "
        "the file, or clear 'preset' to choose another table, which gives another picture"
    )


def _by_samples(model: Facts) -> SameCheckpoint:
    mine = model.get("fingerprint", {})
    return lambda theirs: same_checkpoint(theirs, mine)


def _is_possible(theirs: Facts, mine: Facts) -> bool:
    """A table that does not say its family cannot be taken unasked."""
    if theirs.get("family") is None or family_of(theirs["family"]) != mine.get("family"):
        return False
    kinds = [(theirs.get(name), mine.get(name)) for name, _ in KINDS if name != "family"]
    return all(None in pair or pair[0] == pair[1] for pair in kinds) and same_range(theirs, mine)


def _serves(row: LambdaRow, wanted: Wanted) -> bool:
    if wanted.solver is not None and not row.serves(wanted.solver):
        return False
    return not row.is_callable and wanted.steps in (None, asked_steps(row))


def _rank(
    table: LambdaTable, rows: list[LambdaRow], wanted: Wanted, checkpoint: bool | None
) -> tuple[float, ...]:
    """Smaller is better. Of the rows, the nearest in guidance and size counts."""
    theirs, mine = table.model, wanted.model
    shifted = None not in (theirs.get("shift"), mine.get("shift")) and theirs["shift"] != mine["shift"]
    distances = ((_cfg_distance(row, wanted.cfg), _size_distance(row, wanted.size)) for row in rows)
    return checkpoint is not True, compared_patches(theirs, mine), shifted, *min(distances)


def _cfg_distance(row: LambdaRow, cfg: float | None) -> float:
    low, high = cfg_range(row)
    if cfg is None or low is None or high is None:
        return 0.0
    distance = max(_log(low) - _log(cfg), _log(cfg) - _log(high))
    return distance if distance > math.log(NEAR_CFG) else 0.0


def _size_distance(row: LambdaRow, size: tuple[int, ...] | None) -> float:
    shape = row.settings.get("latent_shape")
    if not size or not shape:
        return 0.0
    distance = abs(_log(math.prod(size)) - _log(math.prod(shape[1:])))
    return distance if distance > math.log(NEAR_SIZE) else 0.0


def _log(value: float) -> float:
    return math.log(max(value, 1e-3))


def _why(table: LambdaTable, wanted: Wanted, checkpoint: bool | None) -> str:
    family = wanted.model.get("family")
    if checkpoint is True:
        return f"λ table {table.called}: made for this checkpoint"
    model = table.model.get("name")
    of = f" ({model})" if model else ""
    known = "another checkpoint" if checkpoint is False else "perhaps another checkpoint"
    return f"λ table {table.called}: only a family match, made for {known} of {family}{of}"


def _nothing(wanted: Wanted, distrusted: list[Path], lacking: list[LambdaTable]) -> str:
    if distrusted:
        return _pick_first(distrusted)
    family = wanted.model.get("family")
    if lacking:
        of_solver = f" for {wanted.solver}" if wanted.solver else ""
        return (
            f"distil a table with {wanted.steps or 'such'} steps{of_solver}, or choose steps that there are: "
            f"{lacking[0].called} has {lacking[0].contents()}"
        )
    what = f"for models of the family {family}" if wanted.family else "for this checkpoint"
    return f"connect a λ table, or make one with Distill λ: there is none {what} in your lambdas folders"


def _pick_first(paths: list[Path]) -> str:
    names = ", ".join(path.stem for path in paths[:3])
    return (
        f"pick the λ table {names} once in Load λ table to allow it: tables of other people are not used before you "
        "have chosen them by name"
    )
