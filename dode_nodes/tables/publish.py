"""Files written whole or not at all, under a name that nothing else has, whoever else writes there.

A file is written beside its place under a name of its own, ``.{16 digits}.part``, and then given its name in one step
that fails if the name is taken. A process that is killed leaves at most that part; the next one to save here removes it
once it is an hour old. Only where files cannot have two names (FAT) can a kill at one moment leave an empty file of the
new name; readers say so.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

from ..errors import NameTaken, TableError

Saved = TypeVar("Saved")

_PART = re.compile(r"\.[0-9a-f]{16}\.part")
_STALE_SECONDS = 3600
_NO_LINKS = {
    errno.EPERM,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EINVAL,
    errno.EXDEV,
}
"""FAT, and some network file systems. Windows says EINVAL there."""
_TO_DO = {
    errno.ENOSPC: "make room on this disk",
    errno.EDQUOT: "make room on this disk",
    errno.EFBIG: "make room on this disk",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that can be written to",
    errno.EPERM: "choose a folder that can be written to",
    errno.ENOENT: "create its folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def publish(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Write a file.

    Raises:
        NameTaken: there is something of this name, and ``overwrite`` is false.
        TableError: it cannot be written; says what to do.
    """
    try:
        _remove_stale_parts(path.parent)
        part = path.with_name(f".{secrets.token_hex(8)}.part")
        try:
            _write(part, content)
            (os.replace if overwrite else _give_name)(part, path)
        finally:
            _remove(part)
        _sync_folder(path.parent)
    except FileExistsError as error:
        raise _taken(path) from error
    except (OSError, ValueError) as error:  # the latter of a NUL in the name
        raise unwritable(path, error) from error


def check_new(path: Path) -> None:
    """That a new file can be written here: to know before the work that fills it. A missing folder is made.

    Raises:
        NameTaken: there is something of this name.
        TableError: its folder cannot be written.
    """
    try:
        if is_taken(path):
            raise _taken(path)
        try_writing(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def try_writing(folder: Path) -> None:
    """Make the folder if it is missing, and a file in it that is gone at once.

    Raises:
        OSError: that cannot be done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def is_taken(path: Path) -> bool:
    """Whether there is something of this name, or of one that another system takes for the same: MINE and mine."""
    if os.path.lexists(path):
        return True
    own = _folded(path.name)
    try:
        return any(_folded(name) == own for name in os.listdir(path.parent))
    except (FileNotFoundError, NotADirectoryError):
        return False


def first_free(names: Iterable[Path], save: Callable[[Path], Saved]) -> Saved:
    """Save under the first of these names that is free, even if another process takes one at the same moment.

    Raises:
        TableError: as ``save`` does, for any reason but a taken name.
    """
    for name in names:
        if not is_taken(name):
            try:
                return save(name)
            except NameTaken:
                continue
    raise TableError("all names are taken")


def in_first(folders: Iterable[Path], save: Callable[[Path], Saved]) -> Saved:
    """Save in the first of these folders that takes it: it has cost work.

    Raises:
        TableError: none does; says why the first does not.
    """
    failures = []
    for folder in dict.fromkeys(folders):
        try:
            return save(folder)
        except (TableError, OSError) as error:
            failures.append(str(error))
    raise TableError(f"the table could not be saved: {failures[0]}")


def numbered(path: Path) -> Iterator[Path]:
    """The path, then NAME-2, NAME-3, …"""
    yield path
    yield from (path.with_stem(f"{path.stem}-{n}") for n in count(2))


def unwritable(path: Path, error: Exception) -> TableError:
    """What is wrong, and what to do about it."""
    advice = _TO_DO.get(getattr(error, "errno", None) or 0)
    reason = getattr(error, "strerror", None) or error
    return TableError(f"{path}: cannot be written: {reason}" + (f". To do: {advice}" if advice else ""))


def _taken(path: Path) -> NameTaken:
    return NameTaken(f"{path}: exists already and is not overwritten. Choose another name")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _write(path: Path, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _give_name(part: Path, path: Path) -> None:
    """Without replacing. Where files cannot have two names, an empty one holds the name until the part is moved there."""
    try:
        os.link(part, path)
    except OSError as error:
        if isinstance(error, FileExistsError) or error.errno not in _NO_LINKS:
            raise
        _write(path, b"")
        os.replace(part, path)


def _remove(part: Path) -> None:
    try:
        os.unlink(part)
    except OSError:  # moved, or never made; else the next save removes it
        return


def _remove_stale_parts(folder: Path) -> None:
    """What processes left that were killed."""
    before = time.time() - _STALE_SECONDS
    for name in filter(_PART.fullmatch, os.listdir(folder)):
        with suppress(FileNotFoundError):  # another process has just finished it
            if os.lstat(folder / name).st_mtime < before:
                _remove(folder / name)


def _sync_folder(folder: Path) -> None:
    """So that the name outlives a power cut; Windows has no such call."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # it may be written but not read
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot
        return
    finally:
        os.close(descriptor)
