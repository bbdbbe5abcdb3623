"""The λ table of a picture: what was asked for, what was chosen, and why, in one line."""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ...errors import DodeError
from ...tables import auto
from ...tables.auto import NoTable, Wanted
from ...tables.describe import printable
from ...tables.names import SUFFIX
from ...tables.row import shown_hash
from ...tables.shelf import Shelf
from ...tables.table import LambdaTable
from ...tables.trust import Trust, shipped_hashes
from . import folders
from .model_facts import is_same, model_facts
from .names import AUTO, FALLBACK, INFOTEXT, NONE, STOCK

_PER_PIXEL = 8
_NAME_AND_HASH = re.compile(r"(.*\S) ([0-9a-f]{8,64})")


@dataclass
class Picture:
    """What a picture is sampled with.

    Attributes:
        table: that was chosen; None for none.
        why: it was, or why there is none, in a line.
        said: lines that have been said of it.
    """

    table: LambdaTable | None
    why: str
    said: list[str] = field(default_factory=list)

    @property
    def pin(self) -> str:
        """What an infotext says of it; the same table is found by it again, and no other."""
        return NONE if self.table is None else f"{self.table.name} {shown_hash(self.table.sha256)}"

    def tell(self, p: Any, *lines: str) -> None:
        """Under the picture, once each."""
        for line in map(printable, lines):
            if line not in self.said:
                self.said.append(line)
                p.comment(f"D-ODE: {line}")

    def tell_stock(self, p: Any, why: str) -> None:
        """That the host's own sampler runs."""
        p.extra_generation_params[FALLBACK] = STOCK
        self.tell(p, f"{STOCK} runs: {why}")


_running: weakref.ref[Any] | None = None


def begin(p: Any, asked: str | None) -> Picture:
    """Choose the table of a picture that is about to be made.

    Args:
        asked: for which: "auto", "none", or a name, with digits of the numbers or without.
    """
    global _running
    _running = weakref.ref(p)
    return _choose(p, getattr(p, "dode_axis", None) or asked or AUTO)


def picture_of(p: Any) -> Picture:
    """What was chosen for a picture. A part that another script makes of it, as ADetailer does, has the whole's table."""
    own: Picture | None = getattr(p, "dode_picture", None)
    if own is not None:
        return own
    whole = getattr(_running() if _running is not None else None, "dode_picture", None)
    return _choose(p, whole.pin if whole is not None else AUTO)


def _choose(p: Any, asked: str) -> Picture:
    try:
        picture = _chosen(p, str(asked).strip().removesuffix(SUFFIX))
    except DodeError as error:
        picture = Picture(None, str(error))
    p.dode_picture = picture
    p.extra_generation_params[INFOTEXT] = picture.pin
    return picture


def _chosen(p: Any, asked: str) -> Picture:
    if asked == NONE:
        return Picture(None, "no λ table was asked for")
    if _has_refiner(p):
        return Picture(None, "a refiner takes over within this picture, and a λ table is for one model")
    if asked != AUTO:
        table = _named(asked)
        trust().add(table)
        return Picture(table, f"λ table {table.called}, by name")
    facts = model_facts(p.sd_model)
    size = (p.height // _PER_PIXEL, p.width // _PER_PIXEL)
    wanted = Wanted(facts, cfg=float(p.cfg_scale), size=size)
    try:
        table, why = auto.choose(_shelf(), trust(), wanted, lambda theirs: is_same(theirs, facts))
    except NoTable as error:
        if error.distrusted:
            name = error.distrusted[0].stem
            why = f"choose the λ table {name} once by name: tables of other people are not taken before that"
        else:
            why = "there is no λ table for this model. Make one in the tab Distil λ"
        raise DodeError(why) from error
    return Picture(table, why)


def _named(asked: str) -> LambdaTable:
    """A listed table, by its name; where digits follow, of these numbers.

    Raises:
        DodeError: there is none, or its file cannot be used.
    """
    path = folders.path_of(asked)
    if path is not None:
        return LambdaTable.load(path)
    match = _NAME_AND_HASH.fullmatch(asked)
    found = _shelf().by_hash(match[2], match[1].rpartition("/")[2]) if match else None
    if found is not None:
        return found[1]
    raise DodeError(f"the λ table '{asked[:100]}' is not in your lambdas folders")


def _has_refiner(p: Any) -> bool:
    """Whether another model is to go on. When is no matter: some hosts count steps, some σ."""
    refiner = getattr(p, "refiner_checkpoint_info", None)
    return refiner is not None and refiner != p.sd_model.sd_checkpoint_info


@cache
def _shelf() -> Shelf:
    return Shelf(folders.folders)


@cache
def trust() -> Trust:
    """Which tables may be taken unasked."""
    return Trust(folders.trusted_file(), shipped_hashes(folders.PACK_FOLDER / "README.md"))
