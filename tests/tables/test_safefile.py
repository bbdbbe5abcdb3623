"""Files are read with suspicion, and written whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from dode_nodes.errors import TableError
from dode_nodes.tables import safefile
from dode_nodes.tables.table import LambdaTable

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
    "overlap and a gap": with_header({"a": entry("F64", [1], 8), "b": entry("F64", [1], 8)}, bytes(16)),
    "three offsets": with_header({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8, 8]}}, bytes(8)),
    "a dtype that is a list": with_header({"a": {"dtype": ["F64"], "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
    "a shape that is a number": with_header({"a": {"dtype": "F64", "shape": 1, "data_offsets": [0, 8]}}, bytes(8)),
    "metadata is a list": with_header({"__metadata__": ["format"]}),
    "tensor beyond the file": with_header({"a": entry("F64", [1000], 8000)}, bytes(8)),
    "tensor larger than its bytes": with_header({"a": entry("F64", [1000], 8)}, bytes(8)),
    "overflowing shape": with_header({"a": entry("F64", [2**62, 8], 8)}, bytes(8)),
    "negative shape": with_header({"a": entry("F64", [-1], 8)}, bytes(8)),
    "empty tensor of a huge shape": with_header({"a": entry("F64", [0, 2**63 - 1, 2**40], 0)}),
    "unknown dtype": with_header({"a": entry("F128", [1], 16)}, bytes(16)),
    "dtype that numpy lacks": with_header({"a": entry("F8_E4M3", [8], 8)}, bytes(8)),
    "trailing bytes": with_header({"a": entry("F64", [1], 8)}, bytes(80)),
    "overlap": with_header({"a": entry("F64", [1], 8), "b": entry("F64", [1], 8)}, bytes(8)),
    "gap": with_header({"a": {"dtype": "F64", "shape": [1], "data_offsets": [8, 16]}}, bytes(16)),
    "one name twice": with_header(b'{"a": %s, "a": %s}' % ((b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',) * 2)),
    "a truth value of 2": with_header({"a": entry("BOOL", [1], 1)}, b"\x02"),
    "a shape of truth values": with_header({"a": entry("F64", [True], 8)}, bytes(8)),
    "a shape of text": with_header({"a": entry("F64", "1", 8)}, bytes(8)),
    "nine axes": with_header({"a": entry("F64", [1] * 9, 8)}, bytes(8)),
    "an array of text": with_header({"a": "F64"}),
    "no offsets": with_header({"a": {"dtype": "F64", "shape": [0]}}),
    "an offset of a fraction": with_header({"a": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0.0]}}),
    "a name that steers": with_header({"a\u202e": entry("F64", [1], 8)}, bytes(8)),
    "a name of nothing": with_header({"": entry("F64", [1], 8)}, bytes(8)),
    "a number of a million digits": with_header(b'{"a": %s}' % (b"1" * 1_000_000)),
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(TableError, match=r"hostile\.safetensors: truncated, or not a safetensors file"):
        safefile.read(path)


@pytest.mark.parametrize(
    "facts",
    [
        {"dtype": "U8", "shape": [0, *[2**23] * 7], "data_offsets": [0, 0]},
        {"dtype": "F64", "shape": [1], "data_offsets": [0, 16]},
        {"dtype": "F64", "shape": [2], "data_offsets": [0, 8]},
    ],
)
def test_a_shape_that_does_not_fit_its_bytes_is_said(facts):
    content = with_header({"a": facts}, bytes(facts["data_offsets"][1]))
    with pytest.raises(TableError, match="an array's shape does not fit its bytes"):
        safefile.contents(io.BytesIO(content), len(content))


def test_the_longest_name_of_an_array_and_the_longest_number():
    for length, fits in ((200, True), (201, False)):
        content = with_header({"a" * length: entry("U8", [0], 0)})
        if fits:
            assert safefile.contents(io.BytesIO(content), len(content))
        else:
            with pytest.raises(TableError, match="the name of an array is empty, too long"):
                safefile.contents(io.BytesIO(content), len(content))
    assert safefile.parse_json("1" * 1000) == int("1" * 1000)
    with pytest.raises(TableError, match="a number of 1001 digits"):
        safefile.parse_json("1" * 1001)


def test_file_cut_off_anywhere_is_refused(tmp_path):
    whole, path = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    safefile.write(whole, TENSORS, METADATA, overwrite=False)
    content = whole.read_bytes()
    for length in range(1, len(content), 3):
        path.write_bytes(content[:length])
        with pytest.raises(TableError, match=r"cut\.safetensors: truncated"):
            safefile.read(path)


@pytest.mark.parametrize("read", [safefile.read, safefile.read_header, LambdaTable.load])
def test_what_a_kill_can_leave_without_links_is_told_from_a_damaged_file(tmp_path, read):
    path = tmp_path / "a.safetensors"
    path.touch()
    with pytest.raises(
        TableError, match=r"a\.safetensors: an empty file: .* Delete it, and save the table again"
    ):
        read(path)
    with pytest.raises(TableError, match="truncated"):
        LambdaTable.from_bytes(b"")


def test_too_large_a_file_is_not_read(tmp_path):
    path = tmp_path / "large.safetensors"
    with open(path, "wb") as file:
        file.truncate(safefile.MAX_BYTES + 1)
    with pytest.raises(TableError, match=r"large\.safetensors: 8388609 bytes; a table has at most 8388608"):
        safefile.read(path)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    """A pipe would be waited for, a device read for ever."""
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(TableError, match=f"{path}: not a file"):
            safefile.read(path)


def test_what_is_too_much_for_a_table_is_said(tmp_path):
    path = tmp_path / "much.safetensors"
    many = {f"a{i}": entry("U8", [0], 0) for i in range(safefile.MAX_ARRAYS + 1)}
    for content, why in (
        (
            with_header(b" " * (safefile.MAX_HEADER + 1)),
            "its header has 1048577 bytes; a table's has at most 1048576",
        ),
        (with_header(many), "4097 arrays; a table has at most 4096"),
        (
            with_header(b'{"a": [' + b"{}," * 100_000 + b"0]}"),
            "about 200002 values; a table has at most 131072",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(TableError, match=rf"much\.safetensors: .*{why}"):
            safefile.read(path)


def test_what_is_read_is_what_was_opened(tmp_path, monkeypatch):
    """A name that stands for another file a moment later changes nothing: neither its size nor its kind."""
    path, pipe = tmp_path / "a.safetensors", tmp_path / "pipe"
    safefile.write(path, TENSORS, METADATA, overwrite=False)
    os.mkfifo(pipe)
    opened = os.open

    def swapped(*args, **kwargs):
        descriptor = opened(*args, **kwargs)
        os.replace(pipe, path)
        return descriptor

    monkeypatch.setattr(safefile.os, "open", swapped)
    assert safefile.read(path)[1] == METADATA


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    safefile.write(path, TENSORS, METADATA, overwrite=False)
    size = safefile._size

    def shrinks(descriptor):
        seen = size(descriptor)
        os.truncate(path, 200)
        return seen

    monkeypatch.setattr(safefile, "_size", shrinks)
    with pytest.raises(TableError, match=r"a\.safetensors: truncated"):
        safefile.read(path)


def test_no_descriptor_stays_open(tmp_path):
    path = tmp_path / "a.safetensors"
    safefile.write(path, TENSORS, METADATA, overwrite=False)
    (tmp_path / "bad").write_bytes(b"bad")
    before = os.listdir("/proc/self/fd")
    for each in (path, tmp_path, tmp_path / "bad"):
        with suppress(TableError):
            safefile.read(each)
    assert os.listdir("/proc/self/fd") == before


dtypes = st.sampled_from(["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "bool"])
some_arrays = np_st.arrays(dtypes, np_st.array_shapes(min_dims=0, max_side=3, min_side=0))


@settings(max_examples=50, deadline=None)
@given(tensors=st.dictionaries(st.text("abλ. ", min_size=1, max_size=5), some_arrays, max_size=4))
def test_arrays_are_those_of_the_safetensors_library(tensors):
    content = safetensors.numpy.save(tensors, {"x": "1"})
    read, _ = safefile.contents(io.BytesIO(content), len(content))
    expected = safetensors.numpy.load(content)
    assert read.keys() == expected.keys() == tensors.keys()
    for name, array in read.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name], strict=True)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_what_is_accepted_the_library_accepts(data):
    content = bytearray(safetensors.numpy.save({"a": np.arange(3.0), "b": np.zeros((2, 1), "u1")}, METADATA))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(TableError):
        safefile.contents(io.BytesIO(content), len(content))
        safetensors.deserialize(bytes(content))


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

    monkeypatch.setattr(safefile.os, "open", denied)
    with pytest.raises(TableError, match=r"a\.safetensors: cannot be read: Permission denied"):
        safefile.read(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": -Infinity}',
        "[" * 100_000 + "]" * 100_000,
        "1" * 5000,
        "\ud800",
        "nonsense",
    ],
    ids=range(10),
)
def test_json_is_strict(text):
    with pytest.raises(TableError, match=r"^not valid JSON: "):
        safefile.parse_json(text)


def test_json_is_limited():
    """As Python's objects it would take many times the memory."""
    with pytest.raises(TableError, match=r"^about 6000001 values; a table has at most 131072$"):
        safefile.parse_json("[" + "{}," * 3_000_000 + "]")
    assert safefile.parse_json('{"a": [1, "λ"]}') == {"a": [1, "λ"]}


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
        safefile.write(path, {}, {"new": "1"}, overwrite=False)
    assert path.read_bytes() == content
    safefile.write(path, {}, {"new": "1"}, overwrite=True)
    assert safefile.read(path) == ({}, {"new": "1"})


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    path = tmp_path / "a.safetensors"
    for tensors, metadata, why in (
        ({"a": np.zeros(safefile.MAX_BYTES // 8)}, {}, "bytes are too many for a table"),
        ({}, {"table": "x" * safefile.MAX_HEADER}, "its header has .* bytes"),
        ({"a\x1b[2J": np.zeros(1)}, {}, "the name of an array"),
        ({"a": np.zeros(1, "c8")}, {}, "type"),
    ):
        with pytest.raises(TableError, match=f"not written: .*{why}"):
            safefile.write(path, tensors, metadata, overwrite=False)
    assert os.listdir(tmp_path) == []


def test_longest_name_can_be_written(tmp_path):
    """The partial file's name is no longer than the file's."""
    path = tmp_path / ("x" * 240 + ".safetensors")
    safefile.write(path, TENSORS, METADATA, overwrite=False)
    assert safefile.read(path)[1] == METADATA
