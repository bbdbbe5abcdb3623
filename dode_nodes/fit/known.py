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
from .key import Identity
from .ranks import rank_and_size


@dataclass(frozen=True)
class KnownFit:
    """A fit as another run of the same knows it.

    Attributes:
        identity: without a key where nothing is to be kept.
    """

    identity: Identity

    @classmethod
    def by(cls, key: Callable[[], str], *, redo: bool = False) -> KnownFit:
        """By its key; see ``Identity.of``. The ranks of a group keep nothing: each has a share of the work.

        Args:
            key: makes it.
            redo: what is known of it is forgotten.
        """
        if rank_and_size()[1] > 1:
            return cls(Identity())
        fit = cls(Identity.of(key))
        if redo and fit.work is not None:
            fit.work.clear()
        return fit

    @property
    def work(self) -> Kept | None:
        """What is kept while it is not done."""
        if not self.identity.key:
            return None
        return Kept(_folder() / "work", self.identity.key, Notes(_folder() / "fits.jsonl"))

    @property
    def remarks(self) -> list[str]:
        """What the user should know, one line each."""
        return self.identity.remarks

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
