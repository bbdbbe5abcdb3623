"""What a fit keeps: found again by who made it, never by a stranger's file, within a limit, and never in the way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dode_nodes.tables.kept import SUFFIX, Kept
from dode_nodes.tables.names import SUFFIX as OF_TABLES
from dode_nodes.tables.notes import Notes

FIT, OTHER = "ab" * 32, "cd" * 32


def kept(folder: Path, fit: str = FIT, **changes: int) -> Kept:
    return Kept(folder / "work", fit, Notes(folder / "notes.jsonl"), **changes)


def test_what_was_saved_is_loaded_to_the_bit(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.tensor([1, 2]), "half": torch.randn(4).half()}
    facts = {"stops": [0.1, 14.614643096923828, 5e-324], "none": None, "λ": ["σ"]}
    part = kept(tmp_path).part("0").part("teacher")
    assert part.load() is None
    assert not part.exists()
    part.save(tensors, facts)
    assert part.exists()
    again, found = kept(tmp_path).part("0").part("teacher").load()
    assert found == facts
    assert all(torch.equal(again[name], x) and again[name].dtype == x.dtype for name, x in tensors.items())
    assert kept(tmp_path).part("teacher").load() is None
    assert kept(tmp_path, OTHER).part("0").part("teacher").load() is None


def test_no_list_of_tables_has_it(tmp_path):
    kept(tmp_path).part("rows").save({}, {})
    (file,) = (tmp_path / "work").iterdir()
    assert file.suffix == SUFFIX != OF_TABLES


def test_a_strangers_file_of_the_same_name_is_not_taken(tmp_path):
    part = kept(tmp_path).part("rows")
    part.save({"x": torch.zeros(2)}, {"rows": 1})
    (file,) = (tmp_path / "work").iterdir()
    file.write_bytes(safetensors.torch.save({"x": torch.ones(2)}, {"facts": "{}"}))
    assert part.load() is None


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: b"", lambda content: content + b"x"]
)
def test_a_damaged_file_is_not_taken(damage, tmp_path):
    part = kept(tmp_path).part("rows")
    part.save({"x": torch.zeros(2)}, {})
    (file,) = (tmp_path / "work").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert part.load() is None


def test_another_fits_file_does_not_pose_as_this_ones(tmp_path):
    for fit in (FIT, OTHER):
        kept(tmp_path, fit).part("rows").save({}, {"of": fit})
    mine, theirs = sorted((tmp_path / "work").iterdir())
    mine.write_bytes(theirs.read_bytes())
    assert kept(tmp_path).part("rows").load() is None


def test_of_two_processes_each_takes_what_either_wrote(tmp_path):
    for number in (1, 2):
        kept(tmp_path).part("rows").save({}, {"number": number})
    (file,) = (tmp_path / "work").iterdir()
    second = file.read_bytes()
    kept(tmp_path).part("rows").save({}, {"number": 1})
    assert kept(tmp_path).part("rows").load() == ({}, {"number": 1})
    file.write_bytes(second)  # noted first, written last
    assert kept(tmp_path).part("rows").load() == ({}, {"number": 2})


def test_only_the_fits_own_files_are_cleared(tmp_path):
    for fit in (FIT, OTHER):
        for name in ("a", "b"):
            kept(tmp_path, fit).part(name).save({}, {})
    stranger = tmp_path / "work" / f"mine{OF_TABLES}"
    stranger.touch()
    kept(tmp_path).clear()
    assert kept(tmp_path).part("a").load() is None
    assert kept(tmp_path, OTHER).part("a").load() is not None
    assert stranger.exists()
    kept(tmp_path / "nowhere").clear()


def test_the_oldest_make_room(tmp_path):
    numbers = {"x": torch.zeros(250)}  # 1000 bytes, and a header
    parts = [kept(tmp_path, most_bytes=3500).part(name) for name in "abcd"]
    for age, part in zip((3, 2, 1), parts[:3], strict=True):
        part.save(numbers, {})
        newest = max((tmp_path / "work").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (1000 - age, 1000 - age))
    assert parts[0].load() is not None  # which makes it the newest
    table = tmp_path / "work" / f"mine{OF_TABLES}"
    table.write_bytes(bytes(5000))
    parts[3].save(numbers, {})
    assert [part.load() is not None for part in parts] == [True, False, True, True]
    assert table.exists()
    assert sum(path.stat().st_size for path in (tmp_path / "work").glob(f"*{SUFFIX}")) <= 3500


def test_what_is_larger_than_the_limit_is_not_kept_and_removes_nothing(tmp_path, caplog):
    small, large = (kept(tmp_path, most_bytes=3500).part(name) for name in ("small", "large"))
    small.save({}, {})
    large.save({"x": torch.zeros(1000)}, {})
    assert large.load() is None
    assert small.load() is not None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_is_said_once_and_does_no_harm(error, tmp_path, monkeypatch, caplog):
    def refuses(descriptor: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("os.fsync", refuses)
    kept(tmp_path).part("rows").save({"x": torch.zeros(2)}, {})
    assert len(caplog.records) == 1
    assert os.strerror(error) in caplog.text
    assert list((tmp_path / "work").iterdir()) == []
    assert kept(tmp_path).part("rows").load() is None
