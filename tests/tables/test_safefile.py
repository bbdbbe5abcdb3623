"""Files are read with suspicion, and written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import struct
from pathlib import Path

import numpy as np
import pytest

from dode_nodes.errors import TableError
from dode_nodes.tables import safefile

TENSORS = {"a": np.arange(6.0).reshape(2, 3), "b": np.float64(3.0), "c": np.arange(3, dtype=np.int8)}
METADATA = {"format": "test", "text": "λ"}


@pytest.fixture(autouse=True)
def _in_time():
    """Whatever the file, reading it does not hang: the alarm ends the process."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def with_header(header: bytes | dict, body: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


def entry(dtype: str, shape: list[int], size: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


def test_round_trip(tmp_path):
    path = tmp_path / "a.safetensors"
    safefile.write(path, TENSORS, METADATA, overwrite=False)
    tensors, metadata = safefile.read(path)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(tensors[name], value, strict=True)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_layout_in_memory_does_not_matter(tmp_path):
    path = tmp_path / "a.safetensors"
    value = np.arange(12.0).reshape(3, 4)
    safefile.write(path, {"a": np.asfortranarray(value), "b": value[::-1, ::2]}, {}, overwrite=False)
    tensors, _ = safefile.read(path)
    np.testing.assert_array_equal(tensors["a"], value)
    np.testing.assert_array_equal(tensors["b"], value[::-1, ::2])


# --- Reading ------------------------------------------------------------------------------------------

HOSTILE = {
    "empty": b"",
    "short": b"\x05\x00",
    "zeros": bytes(100),
    "random": np.random.default_rng(0).bytes(5000),
    "pickle": b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94",
    "zip": b"PK\x03\x04" + bytes(100),
    "huge declared header": struct.pack("<Q", 2**63) + b"{}",
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "header is no JSON": with_header(b"{not json"),
    "header is not UTF-8": with_header(b'{"\xff\xfe": 1}'),
    "header is a list": with_header(b"[1, 2]"),
    "deep header": with_header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "metadata is no text": with_header({"__metadata__": {"format": 3}}),
    "tensor beyond the file": with_header({"a": entry("F64", [1000], 8000)}, bytes(8)),
    "tensor larger than its bytes": with_header({"a": entry("F64", [1000], 8)}, bytes(8)),
    "overflowing shape": with_header({"a": entry("F64", [2**62, 8], 8)}, bytes(8)),
    "negative shape": with_header({"a": entry("F64", [-1], 8)}, bytes(8)),
    "empty tensor of a huge shape": with_header({"a": entry("F64", [0, 2**63 - 1, 2**40], 0)}),
    "unknown dtype": with_header({"a": entry("F128", [1], 16)}, bytes(16)),
    "dtype that numpy lacks": with_header({"a": entry("F8_E4M3", [8], 8)}, bytes(8)),
    "trailing bytes": with_header({"a": entry("F64", [1], 8)}, bytes(80)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(TableError, match=r"hostile\.safetensors: truncated, or not a safetensors file"):
        safefile.read(path)


def test_file_cut_off_anywhere_is_refused(tmp_path):
    whole, path = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    safefile.write(whole, TENSORS, METADATA, overwrite=False)
    content = whole.read_bytes()
    for length in range(0, len(content), 3):
        path.write_bytes(content[:length])
        with pytest.raises(TableError, match=r"cut\.safetensors: truncated"):
            safefile.read(path)


def test_too_large_a_file_is_not_read(tmp_path):
    path = tmp_path / "large.safetensors"
    with open(path, "wb") as file:
        file.truncate(safefile.MAX_BYTES + 1)
    with pytest.raises(TableError, match=r"large\.safetensors: 16777217 bytes; a table has at most 16777216"):
        safefile.read(path)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    """A pipe would be waited for, a device read for ever."""
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(TableError, match=f"{path}: not a file"):
            safefile.read(path)


def test_missing_file(tmp_path):
    with pytest.raises(TableError, match=r"none\.safetensors: there is no such file"):
        safefile.read(tmp_path / "none.safetensors")
    with pytest.raises(TableError, match=r"none\.safetensors: there is no such file"):
        safefile.read(tmp_path / "no folder" / "none.safetensors")
    with pytest.raises(TableError, match="null"):
        safefile.read(tmp_path / "nu\0ll")
    with pytest.raises(TableError, match="cannot be read: File name too long"):
        safefile.read(tmp_path / ("x" * 300))


def test_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    safefile.write(path, TENSORS, METADATA, overwrite=False)

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(safefile, "safe_open", denied)
    with pytest.raises(TableError, match=r"a\.safetensors: cannot be read: Permission denied"):
        safefile.read(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": -Infinity}',
        "[" * 200_000 + "]" * 200_000,
        "1" * 5000,
        "\ud800",
        "nonsense",
    ],
    ids=range(9),
)
def test_json_is_strict(text):
    with pytest.raises(TableError, match=r"t\.safetensors: its metadata is not valid JSON"):
        safefile.parse_json(text, Path("t.safetensors"))


def test_json_is_limited():
    """As Python's objects it would take many times the memory."""
    with pytest.raises(TableError, match=r"t\.safetensors: 9000002 characters of metadata"):
        safefile.parse_json("[" + "{}," * 3_000_000 + "]", Path("t.safetensors"))
    assert safefile.parse_json('{"a": [1, "λ"]}', Path("t.safetensors")) == {"a": [1, "λ"]}


# --- Writing ------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A file that is there already, and its content."""
    path = tmp_path / "a.safetensors"
    safefile.write(path, TENSORS, METADATA, overwrite=False)
    return path, path.read_bytes()


def test_nothing_is_overwritten_unasked(saved):
    path, content = saved
    with pytest.raises(TableError, match=r"a\.safetensors: exists already and is not overwritten"):
        safefile.write(path, {}, {}, overwrite=False)
    assert path.read_bytes() == content
    safefile.write(path, {}, {"new": "1"}, overwrite=True)
    assert safefile.read(path) == ({}, {"new": "1"})


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "open"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failing_write_leaves_everything_as_it_was(saved, monkeypatch, where, error):
    path, content = saved

    def fails(*args, **kwargs):
        raise error

    if where == "open":
        monkeypatch.setattr("builtins.open", fails)
    else:
        monkeypatch.setattr(safefile.os, where.removeprefix("os."), fails)
    for target in (path, path.with_name("b.safetensors")):
        with pytest.raises(TableError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            safefile.write(target, TENSORS, METADATA, overwrite=True)
        if isinstance(error, OSError):
            assert str(caught.value) == f"{target}: cannot be written: No space left on device"
    monkeypatch.undo()
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["a.safetensors"]


def test_full_disk_leaves_everything_as_it_was(saved):
    """For real: the system lets no file grow beyond 100 bytes."""
    path, content = saved
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(TableError, match=r"a\.safetensors: cannot be written: File too large"):
            safefile.write(path, TENSORS, METADATA, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["a.safetensors"]


def test_places_that_cannot_be_written_to(tmp_path):
    for path in (tmp_path / "no folder" / "a.safetensors", tmp_path / "nu\0ll", tmp_path / ("x" * 300)):
        with pytest.raises(TableError, match="cannot be written"):
            safefile.write(path, TENSORS, METADATA, overwrite=False)
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(TableError, match=r"folder\.safetensors: exists already"):
        safefile.write(folder, TENSORS, METADATA, overwrite=False)
    with pytest.raises(TableError, match="cannot be written"):
        safefile.write(folder, TENSORS, METADATA, overwrite=True)
    assert os.listdir(tmp_path) == ["folder.safetensors"]


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    path = tmp_path / "a.safetensors"
    for tensors, metadata in (
        ({"a": np.zeros(safefile.MAX_BYTES // 8)}, {}),
        ({}, {"table": "x" * (safefile.MAX_JSON + 1)}),
    ):
        with pytest.raises(TableError, match=r"not written: .* bytes are too many for a table"):
            safefile.write(path, tensors, metadata, overwrite=False)
    assert os.listdir(tmp_path) == []


def test_longest_name_can_be_written(tmp_path):
    """The partial file's name is no longer than the file's."""
    path = tmp_path / ("x" * 240 + ".safetensors")
    safefile.write(path, TENSORS, METADATA, overwrite=False)
    assert safefile.read(path)[1] == METADATA


def test_whether_a_new_file_can_be_written_is_known_before(tmp_path):
    path = tmp_path / "new folder" / "a.safetensors"
    safefile.check_new(path)
    assert os.listdir(path.parent) == []
    path.write_text("mine")
    with pytest.raises(TableError, match="exists already"):
        safefile.check_new(path)
    for bad in (path / "b", tmp_path / ("x" * 300)):
        with pytest.raises(TableError, match="cannot be written"):
            safefile.check_new(bad)


def test_free_names(tmp_path):
    path = tmp_path / "a.safetensors"
    for name in ("a", "a-2", "a-3"):
        free = safefile.free_path(path)
        assert free.name == f"{name}.safetensors"
        free.write_text("")
