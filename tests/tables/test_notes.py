"""Notes: lines that several processes add, of which damaged ones are passed over."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from dode_nodes.tables import notes
from dode_nodes.tables.notes import Notes


def test_what_was_noted_is_found_the_newest_first(tmp_path):
    file = Notes(tmp_path / "sub" / "notes.jsonl")
    assert file.find() == []
    for number in "123":
        file.add(fit="a", number=number)
    file.add(fit="b", number="4")
    assert [note["number"] for note in Notes(tmp_path / "sub" / "notes.jsonl").find(fit="a")] == [
        "3",
        "2",
        "1",
    ]
    assert file.find(fit="a", number="2") == [{"fit": "a", "number": "2"}]
    assert file.find(fit="c") == []


def test_a_line_that_was_cut_off_costs_nothing_else(tmp_path):
    path = tmp_path / "notes.jsonl"
    Notes(path).add(fit="a", number="1")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole + whole[:length])
        Notes(path).add(fit="a", number="2")
        assert [note["number"] for note in Notes(path).find(fit="a")][:1] == ["2"]
        assert {"fit": "a", "number": "1"} in Notes(path).find(fit="a")


def test_lines_that_are_no_notes_are_passed_over(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_bytes(b'\xff\xfe\n[1]\n{"fit": 1}\nnull\n' + b"[" * 100_000 + b'\n{"fit": "a"}\n')
    assert Notes(path).find() == [{"fit": "a"}]


def test_of_a_large_file_the_end_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(notes, "_MOST_BYTES", 200)
    file = Notes(tmp_path / "notes.jsonl")
    for number in range(50):
        file.add(number=str(number))
    found = [int(note["number"]) for note in file.find()]
    assert found == list(range(49, 49 - len(found), -1))
    assert 5 <= len(found) < 50


def _add_many(path: Path, who: str) -> None:
    for number in range(200):
        Notes(path).add(who=who, number=str(number))


def test_several_processes_write_at_the_same_time(tmp_path):
    path = tmp_path / "notes.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add_many, args=(path, who)) for who in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for who in "ab":
        assert [int(note["number"]) for note in Notes(path).find(who=who)] == list(range(199, -1, -1))


def test_a_folder_that_cannot_be_written_is_said(tmp_path, caplog):
    (tmp_path / "file").touch()
    Notes(tmp_path / "file" / "notes.jsonl").add(fit="a")
    assert "cannot note" in caplog.text
