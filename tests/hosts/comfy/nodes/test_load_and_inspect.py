"""Load λ table and Inspect λ table."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from dode_nodes import LambdaRow, LambdaTable, TableError

pytestmark = pytest.mark.comfyui


def small_table() -> LambdaTable:
    return LambdaTable([LambdaRow("euler", [10.0, 3.0, 0.0], (1, 1), [0.0, 0.25])])


@pytest.fixture
def models_folder(pack: object) -> Path:
    """models/lambdas of the ComfyUI under test."""
    import folder_paths

    folder = Path(folder_paths.models_dir) / "lambdas"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_table_is_loaded_by_its_name_and_again_when_it_has_changed(dode, models_folder):
    file = models_folder / "mine.safetensors"
    load = dode.pack.LoadLambdas
    try:
        small_table().save(file)
        assert dode.run(load, name=file.name) == (small_table(),)
        before = load.fingerprint_inputs(file.name)
        assert load.fingerprint_inputs(file.name) == before
        os.utime(file, ns=(1, 1))
        assert load.fingerprint_inputs(file.name) != before
    finally:
        file.unlink()
    assert load.fingerprint_inputs(file.name) == "missing"
    with pytest.raises(TableError, match=r"there is no λ table 'mine\.safetensors' in .*lambdas"):
        dode.run(load, name=file.name)


def test_the_demo_models_tables_come_with_the_pack(dode):
    from dode_nodes.hosts.comfy import table_files

    shipped = {f"demo_{name}.safetensors" for name in ("eps", "flow", "pictures")}
    assert shipped <= set(table_files.names())
    for name in shipped:
        assert dode.run(dode.pack.LoadLambdas, name=name)[0].rows


def test_the_node_says_what_the_table_holds(dode, on_the_node):
    dode.run(dode.pack.LoadLambdas, name="demo_eps.safetensors")
    (line,) = on_the_node
    assert re.fullmatch(r"this table has (\d+, )+\d+ and \d+ steps, made at cfg 2", line)


def test_a_table_is_shown_as_a_picture_and_in_words(dode, drawn):
    picture, text, _ = dode.run(dode.pack.InspectLambdas, table=small_table())
    assert len(drawn) == 1
    assert picture.std() > 0.01
    assert "euler, 2 steps (2 evaluations, noise)" in text
    assert "+0.2500" in text


def test_without_matplotlib_words_take_the_pictures_place(dode, drawn, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    picture, text, _ = dode.run(dode.pack.InspectLambdas, table=small_table())
    assert drawn == []
    assert picture.shape == (1, 64, 640, 3)
    assert picture.std() > 0.01
    assert "+0.2500" in text
