"""Notes that no file can write about itself: what lies where files of strangers may lie counts only if it is noted here.

A note is a line of JSON. Processes add lines and never change one, so that several may write at the same time.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

_MOST_BYTES = 4 * 2**20
"""Of a file, from its end: what is older is forgotten."""


class Notes:
    """A file of them; there need not be one.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, **note: str) -> None:
        """Write one. Where that cannot be done, it is said in the log."""
        line = (
            f"\n{json.dumps(note)}\n".encode()
        )  # after whatever a process that was ended has left of a line
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab", buffering=0) as file:  # in one piece: processes do not mix theirs
                file.write(line)
        except OSError as error:
            logging.warning("D-ODE: cannot note in %s what has been fitted: %s", self._path, error)

    def find(self, **wanted: str) -> list[dict[str, str]]:
        """Those that say so, the newest first."""
        found = [note for line in self._lines() if (note := _note(line)) and wanted.items() <= note.items()]
        return found[::-1]

    def _lines(self) -> list[bytes]:
        try:
            with open(self._path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _MOST_BYTES))
                return file.read(_MOST_BYTES).splitlines()
        except OSError:
            return []


def _note(line: bytes) -> dict[str, str]:
    """A line's note; an empty one where it is none."""
    try:
        note = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) and all(isinstance(value, str) for value in note.values()) else {}
