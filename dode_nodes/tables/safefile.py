"""Safetensors files of small arrays and JSON: read with suspicion, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import TableError

MAX_BYTES = 16 * 2**20
"""No table comes near this; a file beyond it is not read."""
MAX_JSON = 4 * 2**20
"""Characters; Python's objects take up to thirty times the memory of their JSON."""


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Nothing in it is executed.

    Raises:
        TableError: there is no such regular file, it is too large, or it is not safetensors.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise TableError(f"{path}: not a file")
        if status.st_size > MAX_BYTES:
            raise TableError(f"{path}: {status.st_size} bytes; a table has at most {MAX_BYTES}")
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except TableError:
        raise
    except FileNotFoundError:
        raise TableError(f"{path}: there is no such file") from None
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        # The latter come of dtypes and shapes that numpy does not have, and of a NUL in the name.
        raise TableError(f"{path}: truncated, or not a safetensors file: {error}") from error


def write(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], *, overwrite: bool
) -> None:
    """Save whole or not at all: a full disk or a crash leaves no part of a file behind.

    Raises:
        TableError: the file exists and ``overwrite`` is false, or cannot be written, or could not be
            read again.
    """
    content = save({name: np.array(value, order="C") for name, value in tensors.items()}, dict(metadata))
    if len(content) > MAX_BYTES or any(len(text) > MAX_JSON for text in metadata.values()):
        raise TableError(f"{path}: not written: {len(content)} bytes are too many for a table")
    try:
        if not overwrite:
            _refuse_existing(path)
        part = path.with_name(f".{secrets.token_hex(8)}.part")
        try:
            with open(part, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except TableError:
        raise
    except (OSError, ValueError) as error:  # the latter of a NUL in the name
        raise _unwritable(path, error) from error


def check_new(path: Path) -> None:
    """That a new file can be written here: to know before the work that fills it. A missing folder is made.

    Raises:
        TableError: it exists, or its folder cannot be written.
    """
    try:
        _refuse_existing(path)
        try_writing(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error


def try_writing(folder: Path) -> None:
    """Make the folder if it is missing, and a file in it that is gone at once.

    Raises:
        OSError: that cannot be done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def free_path(path: Path) -> Path:
    """The path, or where there is something already NAME-2, NAME-3, …"""
    names = chain([path], (path.with_stem(f"{path.stem}-{n}") for n in count(2)))
    return next(name for name in names if not name.exists())


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise TableError(f"{path}: exists already and is not overwritten")


def _unwritable(path: Path, error: Exception) -> TableError:
    return TableError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}")


def parse_json(text: str, path: Path) -> Any:
    """Strict JSON: no NaN, no endless nesting.

    Raises:
        TableError: it is not that.
    """
    if len(text) > MAX_JSON:
        raise TableError(f"{path}: {len(text)} characters of metadata; a table has at most {MAX_JSON}")
    try:
        return json.loads(text, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path}: its metadata is not valid JSON: {error}") from error


def _no_constants(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
