"""What the Comfy registry reads, and what stays out of its archive."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.import_comfyui import REPOSITORY
from tests.server import PACK_CONTENTS


@pytest.fixture
def kept_out() -> list[str]:
    """Files of the repository that .comfyignore names; git knows its syntax."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this is no clone")
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore"]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_what_only_developers_need_is_not_in_the_archive(kept_out):
    assert {name.split("/")[0] for name in kept_out} >= {".ci", "benchmarks", "tests"}
    needed = {
        *PACK_CONTENTS,
        "assets",
        "docs",
        "install.py",
        "scripts",
        "pyproject.toml",
        "requirements.txt",
        "README.md",
    }
    assert not needed & {name.split("/")[0] for name in kept_out}


def test_the_registry_finds_what_it_asks_for():
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    fields = dict(
        re.findall(r'^([\w-]+) = "(.*)"', text.partition("[tool.comfy]")[2].partition("\n[")[0], re.MULTILINE)
    )
    assert set(fields) == {"PublisherId", "DisplayName", "Icon", "requires-comfyui"}
    owner, repository = re.search(
        r'^Repository = "https://github\.com/([^/]+)/([^/"]+)"', text, re.MULTILINE
    ).groups()
    assert fields["PublisherId"] == owner
    *_, icon_owner, icon_repository, branch, folder, icon = fields["Icon"].split("/")
    assert (icon_owner, icon_repository, branch) == (owner, repository, "main")
    assert (REPOSITORY / folder / icon).is_file()
    assert f"ComfyUI {fields['requires-comfyui'].removeprefix('>=')} or newer" in (
        REPOSITORY / "README.md"
    ).read_text(encoding="utf-8")
