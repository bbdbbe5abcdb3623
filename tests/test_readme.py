"""README.md and docs/: the Python example runs, links lead somewhere, and the front page stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dode_nodes import LambdaTable
from tests.import_comfyui import REPOSITORY
from tests.oracles import two_peaks
from tests.toys import karras, latents

README = REPOSITORY / "README.md"
PAGES = [README, REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
MOST_BYTES = 9_000
COMMANDS = (
    'pip install -c constraints.txt -e ".[test]" && python -m pytest -n 2 --dist loadfile --no-loadscope-reorder',
    'pip install torch==2.13.0 && pip install -c constraints.txt -e ".[demo]" && python -m dode_nodes demo',
)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"^```python\n(.*?)^```$", read(README), re.DOTALL | re.MULTILINE)
    names = {"model": two_peaks, "x": latents(8), "fresh_x": latents(4, seed=1), "sigmas": karras(5)}
    exec(example[1], names)  # noqa: S102  # it is the subject

    row, y = names["row"], names["y"]
    assert LambdaTable.load(tmp_path / "mine.safetensors").rows == (row,)
    assert row.is_refined
    assert row.errors.dode[0] < row.errors.stock
    assert y.shape == names["fresh_x"].shape
    assert torch.isfinite(y).all()


def test_the_front_page_stays_short():
    assert len(README.read_bytes()) < MOST_BYTES


@pytest.mark.parametrize("command", COMMANDS)
def test_the_front_page_has_the_command(command):
    assert f"    {command}\n" in read(README)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_of_the_repository(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read(page))
    missing = [link for link in links if "://" not in link and not (page.parent / link).resolve().exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_that_is_named_exists(page):
    named = re.findall(r"\b(?:dode_nodes|benchmarks)/[\w/.]*", read(page))
    assert [name for name in named if not (REPOSITORY / name.rstrip(".")).exists()] == []
