"""docs/diffusers.md: its example runs, and its command is one."""

from __future__ import annotations

import re
import shlex
from typing import Any

from dode_nodes.cli.commands import _parser
from tests.import_comfyui import REPOSITORY

PAGE = (REPOSITORY / "docs" / "diffusers.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    *_, example = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(example, names)  # noqa: S102  # it is the subject
    assert names["latents"].isfinite().all()
    assert "distance to the teacher: Euler" in capsys.readouterr().out


def test_the_command_is_one():
    (command,) = re.findall(r"^    python -m dode_nodes (.*)$", PAGE, re.MULTILINE)
    options = _parser().parse_args(shlex.split(command))
    assert str(options.pipeline) == "DIR"
    assert options.steps == [4, 6]
