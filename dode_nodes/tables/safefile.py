"""Safetensors files of small arrays and JSON: read with suspicion, written whole or not at all."""

from __future__ import annotations

import io
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from safetensors.numpy import save

from ..errors import TableError
from .publish import publish

Taken = TypeVar("Taken")

MAX_BYTES = 8 * 2**20
"""No table comes near this; a file beyond it is not read."""
MAX_HEADER = 2**20
"""Bytes of a file's header, in which the metadata is."""
MAX_VALUES = 2**17
"""In a header, and in its metadata: as Python's objects they take up to a hundred bytes each."""
MAX_ARRAYS = 4096

_LONGEST_NAME = 200
_MOST_DIGITS = 1_000
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
"""The numbers that numpy has, too."""


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a safetensors file. Nothing in it is executed, and no more read than a table may have.

    Raises:
        TableError: there is no such regular file, it is too large, or it is not safetensors.
    """
    return _of_file(path, contents)


def read_header(path: Path | str) -> bytes:
    """The bytes of a file's header, not yet parsed.

    Raises:
        TableError: as ``read``, for all that is known so far.
    """
    return _of_file(path, _header_bytes)


def _of_file(path: Path | str, take: Callable[[IO[bytes], int], Taken]) -> Taken:
    """What ``take`` makes of an opened file and its size."""
    try:
        descriptor = _opened(path)
        try:
            size = _size(descriptor)
            with open(descriptor, "rb", buffering=0, closefd=False) as file:
                return take(file, size)
        finally:
            os.close(descriptor)
    except TableError as error:
        raise TableError(f"{path}: {error}") from error
    except FileNotFoundError:
        raise TableError(f"{path}: there is no such file") from None
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise TableError(f"{str(path)!r}: cannot be read: {error}") from error


def _opened(path: Path | str) -> int:
    """A descriptor; a pipe is not waited for."""
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    return os.open(path, flags)


def _size(descriptor: int) -> int:
    """Of what was opened, whatever the name stands for by now."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise TableError("not a file")
    if status.st_size > MAX_BYTES:
        raise TableError(f"{status.st_size} bytes; a table has at most {MAX_BYTES}")
    if not status.st_size:  # what a kill can leave where files cannot have two names: publish._give_name
        raise TableError("an empty file: saving it was broken off. Delete it, and save the table again")
    return status.st_size


def contents(file: IO[bytes], size: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of so many bytes.

    Raises:
        TableError: they are not safetensors, or have more in them than a table.
    """
    text = _header_bytes(file, size)
    header = _header(text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged("its metadata is no text")
    return _arrays(file, header, size - 8 - len(text)), metadata


def _header_bytes(file: IO[bytes], size: int) -> bytes:
    length = int.from_bytes(_exactly(file, 8), "little")
    if length > size - 8:
        raise _damaged("its header is longer than the file")
    if length > MAX_HEADER:
        raise TableError(f"its header has {length} bytes; a table's has at most {MAX_HEADER}")
    return _exactly(file, length)


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = parse_json(text.decode())
    except UnicodeDecodeError:
        raise _damaged("its header is no UTF-8") from None
    except TableError as error:
        raise _damaged(f"its header: {error}") from error
    if not isinstance(header, dict):
        raise _damaged("its header is no object")
    return header


def _arrays(file: IO[bytes], header: Mapping[str, Any], size: int) -> dict[str, np.ndarray]:
    """In the order of their bytes, which they fill without gaps."""
    if len(header) > MAX_ARRAYS:
        raise TableError(f"{len(header)} arrays; a table has at most {MAX_ARRAYS}")
    entries = sorted((_entry(name, facts) for name, facts in header.items()), key=lambda each: each.begin)
    end = 0
    for each in entries:
        if each.begin != end:
            raise _damaged("its arrays overlap, or there are gaps between them")
        end += each.size
    if end != size:
        raise _damaged("its arrays do not end where the file does")
    return {each.name: each.read(file) for each in entries}


class _Entry(NamedTuple):
    """An array, as the header has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize

    def read(self, file: IO[bytes]) -> np.ndarray:
        array = np.frombuffer(_exactly(file, self.size), _DTYPES[self.dtype]).reshape(self.shape)
        if self.dtype != "BOOL":
            return array
        if array.max(initial=0) > 1:
            raise _damaged("it has truth values other than 0 and 1")
        return array.view(bool)


def _entry(name: str, facts: Any) -> _Entry:
    """One array's place; its sizes are small enough to be computed with."""
    try:
        dtype, shape, (begin, end) = facts["dtype"], facts["shape"], facts["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _damaged("it does not say where its arrays are") from None
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise _damaged("the name of an array is empty, too long or cannot be printed")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _damaged("it has numbers of a type that tables do not have")
    if not isinstance(shape, list) or len(shape) > 8:
        raise _damaged("an array has no shape")
    if not all(type(n) is int and 0 <= n <= MAX_BYTES for n in (*shape, begin, end)):
        raise _damaged("an array is larger than the file")
    entry = _Entry(name, dtype, tuple(shape), begin)
    if math.prod(n for n in shape if n) > MAX_BYTES or end - begin != entry.size:
        raise _damaged("an array's shape does not fit its bytes")
    return entry


def _exactly(file: IO[bytes], count: int) -> bytes:
    """The next so many bytes; a file may shrink while it is read."""
    parts = []
    while count > 0:
        part = file.read(count)
        if not part:
            raise _damaged("it ends too early")
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _damaged(why: str) -> TableError:
    return TableError(f"truncated, or not a safetensors file: {why}")


def write(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], *, overwrite: bool
) -> None:
    """Save whole or not at all: a full disk or a crash leaves no part of a file behind.

    Raises:
        NameTaken: the file exists and ``overwrite`` is false.
        TableError: it cannot be written, or could not be read again.
    """
    content = save({name: np.array(value, order="C") for name, value in tensors.items()}, dict(metadata))
    if len(content) > MAX_BYTES:
        raise TableError(f"{path}: not written: {len(content)} bytes are too many for a table")
    try:
        contents(io.BytesIO(content), len(content))
    except TableError as error:
        raise TableError(f"{path}: not written: {error}") from error
    publish(path, content, overwrite=overwrite)


def parse_json(text: str) -> Any:
    """Strict JSON: no NaN, no endless nesting, no field twice, and no more values than a table may have.

    Raises:
        TableError: it is not that.
    """
    if (values := sum(map(text.count, ",[{"))) > MAX_VALUES:
        raise TableError(f"about {values} values; a table has at most {MAX_VALUES}")
    try:
        return _STRICT.decode(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"not valid JSON: {error}") from error


def _no_constants(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:  # the time that they take grows with their square
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):  # programs differ in which of them they take
        raise ValueError("a field is there twice")
    return fields


_STRICT = json.JSONDecoder(parse_constant=_no_constants, parse_int=_whole_number, object_pairs_hook=_object)
