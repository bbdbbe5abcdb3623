"""The WebUIs to test in, each run by its own Python; and their servers.

python -m tests.webui_hosts    # a line for each
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WebUI:
    """A checkout of a WebUI, and the Python that runs it."""

    checkout: Path
    python: Path

    @property
    def kind(self) -> str:
        """Which of the family."""
        if (self.checkout / "ldm_patched").is_dir() and not (self.checkout / "backend").is_dir():
            return "reForge"
        if not (self.checkout / "modules_forge").is_dir():
            return "AUTOMATIC1111"
        return "Forge Neo" if (self.checkout / "modules" / "sd_samplers_cfgpp.py").exists() else "Forge"

    def __str__(self) -> str:
        asked = subprocess.run(
            ["git", "-C", self.checkout, "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True
        )
        return f"{self.kind} {asked.stdout.strip() or '?'} at {self.checkout}"


def find_webuis() -> list[WebUI]:
    """$WEBUI_PATHS, "FOLDER=PYTHON:FOLDER=PYTHON"; else all ~/webui/* that have a .venv."""
    if "WEBUI_PATHS" in os.environ:
        entries = filter(None, os.environ["WEBUI_PATHS"].split(os.pathsep))
        return [WebUI(*map(Path, entry.split("=", 1))) for entry in entries]
    found = sorted((Path.home() / "webui").glob("*/modules/sd_samplers.py"))
    checkouts = [(path.parents[1], path.parents[1] / ".venv/bin/python") for path in found]
    return [WebUI(checkout, python) for checkout, python in checkouts if python.exists()]


def arguments(checkout: Path) -> list[str]:
    """Of the command line: on the CPU, offline, with nothing checked or fetched."""
    common = ["--skip-torch-cuda-test", "--skip-version-check"]
    kind = WebUI(checkout, Path()).kind
    if kind == "Forge Neo":
        return [*common, "--always-cpu", "--attention-pytorch"]
    common += ["--no-hashing", "--no-download-sd-model"]
    if kind == "AUTOMATIC1111":
        return [*common, "--use-cpu", "all", "--no-half", "--precision", "full"]
    return [*common, "--always-cpu"]


WEBUIS = find_webuis()

if __name__ == "__main__":
    for each in WEBUIS:
        print(f"found {each}, run by {each.python}")
    if not WEBUIS:
        print("found no WebUI: its tests will skip")
    sys.exit(0)
