"""A distillation that is not made again where it was made before."""

from __future__ import annotations

from typing import Protocol

from ..fit.known import KnownFit
from ..tables.table import LambdaTable


class Work(Protocol):
    """A distillation that can be ended at any time."""

    def run(self) -> object:
        """All of it."""

    def table(self) -> LambdaTable | None:
        """What has been found so far; None where that is nothing."""


class Once:
    """Work, unless it is done.

    Args:
        work: the work.
        fit: what is known of it.
    """

    def __init__(self, work: Work, fit: KnownFit) -> None:
        self._work, self._fit = work, fit
        self._known: LambdaTable | None = None

    def run(self) -> None:
        """All of it, or nothing."""
        self._known = self._fit.table()
        if self._known is not None:
            print("this was fitted before, and the same table is written. To fit it again, add --redo")
            return
        for line in self._fit.remarks:
            print(line)
        self._work.run()
        if (table := self._work.table()) is not None:
            self._fit.finish(table)

    def table(self) -> LambdaTable | None:
        """What has been found so far; None where that is nothing."""
        return self._known or self._work.table()
