"""Fits that are done are not made again, and fits that were ended go on, where no host has a folder for that.

All of it lies in the user's cache folder: $XDG_CACHE_HOME or ~/.cache, in dode_nodes. It may be deleted at any time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DodeError
from ..tables.kept import Kept
from ..tables.notes import Notes
from ..tables.table import LambdaTable
from .key import NoKey
from .ranks import rank_and_size


@dataclass(frozen=True)
class KnownFit:
    """A fit as another run of the same knows it.

    Attributes:
        key: see ``fit.key``; "" where nothing is to be kept.
        unlike: what in it cannot be compared, so that there is none.
    """

    key: str = ""
    unlike: str = ""

    @classmethod
    def by(cls, key: Callable[[], str], *, redo: bool = False) -> KnownFit:
        """By its key, unless that raises ``NoKey``. The ranks of a group keep nothing: each has a share of the work.

        Args:
            key: makes it.
            redo: what is known of it is forgotten.
        """
        if rank_and_size()[1] > 1:
            return cls()
        try:
            fit = cls(key())
        except NoKey as what:
            return cls(unlike=str(what))
        if redo and fit.work is not None:
            fit.work.clear()
        return fit

    @property
    def work(self) -> Kept | None:
        """What is kept while it is not done."""
        return Kept(_folder() / "work", self.key, Notes(_folder() / "fits.jsonl")) if self.key else None

    @property
    def remarks(self) -> list[str]:
        """What the user should know, one line each."""
        if not self.unlike:
            return []
        return [
            f"this fit will not be recognised another time, because of {self.unlike}: it is made anew each time"
        ]

    def table(self) -> LambdaTable | None:
        """What it has come to; None where it has not been made, or is not known any more."""
        found = None if self.work is None else self.work.part("table").load()
        try:
            return None if found is None else LambdaTable.from_json(found[1])
        except DodeError:  # of another version
            return None

    def finish(self, table: LambdaTable) -> None:
        """Keep what it has come to, in place of the work for it."""
        if self.work is not None:
            self.work.clear()
            self.work.part("table").save({}, table.to_json())


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dode_nodes"
