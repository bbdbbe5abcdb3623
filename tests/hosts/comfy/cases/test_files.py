"""Names, folders and saving: nothing that was worked for is lost, and nothing lands where it should not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from dode_nodes.hosts.comfy.launch import find_comfyui
from tests.hosts.comfy.cases.subjects import Subject, small
from tests.hosts.comfy.node_calls import names_in
from tests.server import install_pack

pytestmark = pytest.mark.comfyui

HOST = Path(__file__).parents[1] / "host_process.py"
"""A ComfyUI that loads a pack and distils."""


# --- names


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "sdxl/plain",
        "plain.safetensors",
        "sdxl/",
        "sdxl//",
        ".",
        "sdxl/..",
        "../x",
        "/evil",
        "//server/share/x",
        "C:/evil",
        "C:evil",
        "\\evil",
        "\\Users\\me\\Startup\\x",
        "\\\\server\\share\\x",
        "..\\x",
        "a\\..\\..\\x",
        "sdxl\\x",
        "CON",
        "sdxl/nul.v2",
        "aux/x",
        "LPT1",
        "sdxl./x",
        "sdxl /x",
    ],
)
@pytest.mark.slow_host
def test_a_name_is_refused_first_or_made_safe_for_both_systems(name, dode, tables):
    subject = small()
    before = _files(tables.parent)
    try:
        dode.distil(subject, steps="2", scale=2, latents=2, save_name=name)
    except dode.library.DodeError:
        assert not subject.calls
        assert _files(tables.parent) == before
    else:
        (new,) = _files(tables.parent) - before
        assert _is_safe(new.relative_to(tables))


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def _is_safe(path: PurePosixPath) -> bool:
    """By Windows' rules, the stricter ones: characters, devices, and no dot or blank at the end of a part."""
    device = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])\s*(\..*)?", re.I)
    return path.suffix == ".safetensors" and not any(
        re.search(r'[<>:"/\\|?*\x00-\x1f]|[. ]$', part) or device.fullmatch(part) for part in path.parts
    )


# --- a save that fails at the end


def _becomes_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


@pytest.mark.parametrize("happens", [shutil.rmtree, _becomes_a_file])
def test_rows_outlive_a_save_that_fails_at_the_end(happens, dode, tables):
    """They are given out, or lie in some other file beneath ComfyUI's folder."""
    base = tables.parents[1]
    subject = small()
    before = _files(base)
    at(subject, 10, lambda: happens(tables / "sub"))
    try:
        given = dode.distil(subject, save_name="sub/name")["table"].rows
    except dode.library.DodeError:
        given = []
    saved = [path for path in _files(base) - before if path.suffix == ".safetensors"]
    assert given or [dode.library.LambdaTable.load(path) for path in saved]


def at(subject: Subject, evaluation: int, do: Callable[[], object]) -> None:
    """Do something before an evaluation of the network."""
    network = subject.model.model
    evaluate = network._apply_model

    def watched(*args: Any, **kwargs: Any) -> Any:
        if len(subject.calls) + 1 == evaluation:
            do()
        return evaluate(*args, **kwargs)

    network._apply_model = watched


# --- the same again


def test_what_was_distilled_is_found_again(dode, tables):
    """After a restart, or another workflow: the model is loaded anew, the inputs are the same."""
    first, again = small(), small()
    made = dode.distil(first)
    found = dode.distil(again)
    assert found["table"] == made["table"]
    assert sum(again.calls) < sum(first.calls) / 2
    assert names_in(tables) == ["table"]


@pytest.mark.slow_host
def test_another_request_is_distilled(dode, tables):
    little = {"steps": "3", "scale": 2, "latents": 2}
    for number, changes in enumerate([{}, {"seed": 2}, {"cfg": 3.0}, {"steps": "4"}], 1):
        subject = small()
        dode.distil(subject, **(little | changes))
        assert subject.calls, changes
        assert len(list(tables.rglob("*.safetensors"))) == number, changes


# --- folders


@pytest.mark.parametrize(
    "sections",
    [
        "mine:\n  base_path: {base}\n  is_default: true\n  lambdas: |\n    archive\n    fast ssd\n",
        "one:\n  base_path: {base}\n  is_default: true\n  lambdas: archive\n"
        "two:\n  base_path: {base}\n  is_default: true\n  lambdas: fast ssd\n",
    ],
    ids=["lines", "sections"],
)
def test_tables_are_saved_where_comfyuis_default_is(sections, dode, tmp_path, monkeypatch):
    """extra_model_paths.yaml, and what ComfyUI makes of it."""
    import comfy.cli_args
    import folder_paths

    file = tmp_path / "extra_model_paths.yaml"
    file.write_text(sections.format(base=tmp_path))
    monkeypatch.setattr(comfy.cli_args.args, "extra_model_paths_config", [[str(file)]])
    folders, extensions = folder_paths.folder_names_and_paths["lambdas"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "lambdas", (list(folders), extensions))
    for name in ("archive", "fast ssd"):
        folder_paths.add_model_folder_path("lambdas", str(tmp_path / name), is_default=True)
    dode.distil(small(), steps="2", scale=2, latents=2)
    assert folder_paths.get_folder_paths("lambdas")[0] == str(tmp_path / "fast ssd")
    assert [path.parent.name for path in tmp_path.rglob("*.safetensors")] == ["fast ssd"]


@pytest.mark.slow_host
def test_a_read_only_install_is_told_where_tables_can_be_saved(comfyui, tmp_path):
    """Root writes anywhere unless that right is taken from it."""
    prefix = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    if prefix and shutil.which("setpriv") is None:
        pytest.skip("root, and no setpriv")
    pack = install_pack(tmp_path / "custom_nodes")
    (pack / "lambdas").chmod(0o555)
    (tmp_path / "models").mkdir()
    done = subprocess.run(
        [*prefix, sys.executable, HOST, find_comfyui(), tmp_path, pack],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    error = done.stderr.splitlines()[-1]
    assert "cannot be saved" in error
    assert re.search(r"(make|create)\b.*models.lambdas", error, re.I)
