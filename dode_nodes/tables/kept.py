"""What a fit has worked for, in files of its own: a fit that was ended goes on from there.

They lie where tables do, under an ending that no list of tables has. A stranger's file may lie there, too, so one counts
only if its hash was noted elsewhere by who wrote it. Nothing of this is needed: where it cannot be written, or is gone
or damaged, the work is done again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import TableError
from .notes import Notes
from .publish import publish

SUFFIX = ".dode-work"
MOST_BYTES = 2**30
"""Of all such files in a folder. The oldest are removed for new ones."""
_SHOWN_DIGITS = 16
_NOTHING = "-"
"""A tensor in files that would have none: safetensors 0.4.2 writes those with a header that is no JSON."""


@dataclass(frozen=True)
class Kept:
    """The work of one fit, or of a part of it.

    Attributes:
        folder: where its files lie.
        fit: what the fit is known by, in hexadecimal; see ``fit.key``.
        notes: outside of that folder.
        most_bytes: of all fits' files.
        name: of the part; "" for the whole.
    """

    folder: Path
    fit: str
    notes: Notes
    most_bytes: int = MOST_BYTES
    name: str = ""

    def part(self, name: str) -> Kept:
        """A part of it; parts have parts."""
        return replace(self, name=f"{self.name}-{name}" if self.name else name)

    def exists(self) -> bool:
        """Whether there seems to be something; ``load`` looks closer."""
        return self._path.is_file() and bool(self._hashes())

    def load(self) -> tuple[dict[str, Tensor], Any] | None:
        """Tensors and facts, as they were saved; None where there are none."""
        hashes = self._hashes()
        try:
            content = self._read() if hashes else b""
        except OSError:
            return None
        if hashlib.sha256(content).hexdigest() not in hashes:
            return None
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        tensors = safetensors.torch.load(content)
        tensors.pop(_NOTHING, None)
        return tensors, json.loads(header["__metadata__"]["facts"])

    def save(self, tensors: Mapping[str, Tensor], facts: Any) -> None:
        """Keep this, in place of what there is; where that cannot be done, it is said in the log.

        Args:
            tensors: by name; they share no memory.
            facts: what JSON holds.
        """
        metadata = {"facts": json.dumps(facts)}
        whole = {name: x.contiguous() for name, x in tensors.items()} or {_NOTHING: torch.zeros(1)}
        content = safetensors.torch.save(whole, metadata)
        try:
            self._make_room(len(content))
            publish(self._path, content, overwrite=True)
        except (TableError, OSError) as error:
            logging.warning("D-ODE: not kept, so it is done again if it is needed again: %s", error)
            return
        self.notes.add(fit=self.fit, part=self.name, sha256=hashlib.sha256(content).hexdigest())

    def remove(self) -> None:
        """Remove this part's file, if there is one."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all files of the fit: it is done, or is to be done anew."""
        with suppress(OSError):
            for path in self.folder.glob(f"{self._digits}-*{SUFFIX}"):
                path.unlink(missing_ok=True)

    @property
    def _digits(self) -> str:
        return self.fit[:_SHOWN_DIGITS]

    @property
    def _path(self) -> Path:
        return self.folder / f"{self._digits}-{self.name}{SUFFIX}"

    def _hashes(self) -> set[str]:
        """Those that the file may have: another process may have written it, too."""
        return {note.get("sha256", "") for note in self.notes.find(fit=self.fit, part=self.name)}

    def _read(self) -> bytes:
        with open(self._path, "rb") as file:
            content = file.read(self.most_bytes)
        os.utime(self._path)  # what is used is not the oldest
        return content

    def _make_room(self, size: int) -> None:
        """Remove the oldest files until so many bytes more are within the limit.

        Raises:
            TableError: they are more than the limit.
        """
        if size > self.most_bytes:
            raise TableError(f"{self._path}: {size >> 20} MiB are more than {self.most_bytes >> 20} MiB")
        self.folder.mkdir(parents=True, exist_ok=True)
        files = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # another process has just removed it
                if path != self._path:
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_size, path))
        total = size + sum(each for _, each, _ in files)
        for _, each, path in sorted(files):
            if total <= self.most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= each
