"""Which tables may be taken without being asked for: those that their user made, or picked once by name.

Kept outside of the tables, by hash: no file can claim it for itself.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from .table import LambdaTable

_MOST_BYTES = 4 * 2**20
_HASH = re.compile(r"[0-9a-f]{64}")
_LISTED = re.compile(r"^- .*: `([0-9a-f]{64})`$", re.MULTILINE)
"""A line of the page that ``python -m dode_nodes index`` writes."""


def shipped_hashes(page: Path) -> frozenset[str]:
    """Of the tables that a page of the pack lists; nothing where there is no such page.

    Only of its own lines for them: the names of models on it are strangers' words.
    """
    try:
        return frozenset(_LISTED.findall(page.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError):
        return frozenset()


class Trust:
    """A file with one hash a line; there need not be one.

    Args:
        path: the file.
        shipped: hashes of tables that come with the pack.
    """

    def __init__(self, path: Path, shipped: frozenset[str] = frozenset()) -> None:
        self._path = path
        self._shipped = shipped
        self._read: tuple[object, frozenset[str]] = (None, frozenset())

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._shipped or sha256 in self._own()

    @property
    def stamp(self) -> str:
        """Changes when the file does."""
        try:
            status = os.stat(self._path)
        except OSError:
            return ""
        return f"{status.st_mtime_ns} {status.st_size}"

    def add(self, table: LambdaTable) -> None:
        """From now on this table may be taken. Where that cannot be noted, it is said in the log and asked for again."""
        if table.sha256 in self:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(
                self._path, "a", encoding="ascii"
            ) as file:  # one short line: processes do not mix theirs
                file.write(f"{table.sha256}\n")
        except OSError as error:
            logging.warning("D-ODE: cannot note which λ tables you use in %s: %s", self._path, error)

    def _own(self) -> frozenset[str]:
        stamp = self.stamp
        if stamp != self._read[0]:
            try:
                with open(self._path, "rb") as file:
                    lines = file.read(_MOST_BYTES).decode("ascii", "replace").split()
            except OSError:
                lines = []
            self._read = stamp, frozenset(line for line in lines if _HASH.fullmatch(line))
        return self._read[1]
