"""A fit that is done is known by its key, and by nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dode_nodes import LambdaTable
from dode_nodes.fit import known
from dode_nodes.fit.key import NoKey
from dode_nodes.fit.known import KnownFit
from dode_nodes.tables.kept import SUFFIX
from tests.tables.rows import row_of

KEY, OTHER = "ab" * 32, "cd" * 32


def fit(key: str = KEY, **how: bool) -> KnownFit:
    return KnownFit.by(lambda: key, **how)


def a_table() -> LambdaTable:
    return LambdaTable(
        [row_of(), row_of(weights=np.eye(row_of().steps), form="history")], model={"family": "sd15"}
    )


def cache() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"])


def test_a_finished_fit_is_known_by_its_key_alone():
    assert fit().table() is None
    fit().finish(a_table())
    assert fit().table() == a_table()
    assert fit(OTHER).table() is None


def test_finished_work_is_gone_and_other_work_is_not():
    for key in (KEY, OTHER):
        fit(key).work.part("teacher").save({}, "states")
    fit().finish(a_table())
    assert fit().work.part("teacher").load() is None
    assert fit(OTHER).work.part("teacher").load() == ({}, "states")


def test_redo_forgets_it():
    fit().finish(a_table())
    assert fit(redo=True).table() is None
    assert fit().table() is None


def test_what_is_damaged_or_of_another_version_is_not_known():
    fit().finish(a_table())
    (file,) = cache().rglob(f"*{SUFFIX}")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    assert fit().table() is None
    file.write_bytes(whole)
    assert fit().table() == a_table()
    fit().work.part("table").save({}, {"format": "of tomorrow"})
    assert fit().table() is None


def test_without_a_key_nothing_is_kept_and_it_is_said_why():
    def no_key() -> str:
        raise NoKey("a hook")

    unknown = KnownFit.by(no_key)
    assert unknown.work is None
    unknown.finish(a_table())
    assert unknown.table() is None
    assert not cache().exists()
    (line,) = unknown.remarks
    assert "because of a hook" in line
    assert fit().remarks == []


def test_ranks_keep_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(known, "rank_and_size", lambda: (1, 2))
    fit().finish(a_table())
    assert fit().work is None
    assert not cache().exists()


def test_a_folder_that_cannot_be_written_costs_no_more_than_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    fit().finish(a_table())
    assert fit().table() is None
    assert fit(redo=True).table() is None
