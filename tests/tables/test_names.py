"""Names of tables: one rule that knows Windows and Unix."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dode_nodes import TableError
from dode_nodes.tables.names import parts_of


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mine", ("mine",)),
        (" mine.safetensors ", ("mine",)),
        ("sdxl/6 steps", ("sdxl", "6 steps")),
        ("sdxl\\mine", ("sdxl", "mine")),
        ("v1.5", ("v1.5",)),
        ("画像", ("画像",)),
        ("x" * 200, ("x" * 200,)),
        ("console/com", ("console", "com")),
    ],
)
def test_a_name_is_folders_and_a_file(name, parts):
    assert parts_of(name) == parts


@pytest.mark.parametrize(
    "name",
    ["", "  ", ".safetensors", "/x", "\\x", "//server/share/x", "C:\\x", "c:x", "a/", "a//b", "../x", "a/../b", "a/./b",
     "a\\..\\b", "con", "AUX/x", "prn", "nul", "com1", "lpt1.txt", "com¹", "x.", "x /y", "a\x00b", "x" * 201, "画" * 67,
     *(f"a{character}b" for character in '<>:"|?*\x1f\x7f')],
)  # fmt: skip
def test_what_leads_out_or_means_something_else_elsewhere_is_refused(name):
    with pytest.raises(TableError, match="give the table"):
        parts_of(name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (" .safetensors", "give the table a name: letters"),
        ("a/../b", r"'\.\.' is not the name of a folder"),
        ("a//b", "it begins or ends with /, or has // in it"),
        ("a?", "one of the characters"),
        ("a /b", "a part of it begins or ends with a space, or ends with a dot"),
        ("nul", "'nul' is the name of a device on Windows"),
        ("x" * 201, "a part of it is longer than 200 bytes"),
    ],
)
def test_it_is_said_why(name, why):
    with pytest.raises(TableError, match=why):
        parts_of(name)


@given(st.text(st.sampled_from("ab.:/\\ conCON~1*\x00"), max_size=12))
def test_whatever_passes_stays_in_its_folder_on_both_systems(name):
    try:
        parts = parts_of(name)
    except TableError:
        return
    for system in (PurePosixPath, PureWindowsPath):
        inside = system("/folder").joinpath(*parts)
        assert inside.parent.parts[: len(system("/folder").parts)] == system("/folder").parts
        assert len(inside.parts) == len(system("/folder").parts) + len(parts)
    assert not PureWindowsPath(*parts).is_reserved()
