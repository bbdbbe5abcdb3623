"""Chromium and playwright-core, for tests that look at what people see."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

CHROMIUM = "/usr/bin/chromium"
MODULES = "/work/browser/node_modules"


def missing() -> str | None:
    """What a browser test lacks here; None for nothing."""
    if shutil.which("node") is None:
        return "no node"
    if not Path(os.environ.get("CHROMIUM", CHROMIUM)).exists():
        return f"no {CHROMIUM}: apt-get install chromium, or set CHROMIUM"
    folders = [Path(folder) for folder in node_environment()["NODE_PATH"].split(os.pathsep)]
    if not any((folder / "playwright-core").is_dir() for folder in folders):
        return "no playwright-core: npm install playwright-core, and set NODE_PATH to its node_modules"
    return None


def node_environment() -> dict[str, str]:
    """The environment of a node process that finds both."""
    return {"NODE_PATH": MODULES, "CHROMIUM": CHROMIUM} | os.environ
