"""The ComfyUIs to test in: one in this process, each further one by its own Python.

python -m tests.comfyui_hosts    # a line for each; status 1 where this Python runs none of them
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from dode_nodes.hosts.comfy.launch import find_comfyui


@dataclass(frozen=True)
class Host:
    """A checkout of ComfyUI, and the Python that runs it."""

    checkout: Path
    python: Path

    def __str__(self) -> str:
        try:
            text = (self.checkout / "comfyui_version.py").read_text(encoding="utf-8")
        except OSError:
            text = ""
        version = re.search(r'__version__ = "(.+)"', text)
        return f"ComfyUI {version[1] if version else '?'} at {self.checkout}"

    @property
    def is_of_this_python(self) -> bool:
        """Whether it can be imported here. By its folder: an environment's Python is a link to another one."""
        return self.python.parent == Path(sys.executable).parent


def find_hosts() -> list[Host]:
    """$COMFYUI_PATHS, "FOLDER=PYTHON:FOLDER=PYTHON"; else $COMFYUI_PATH, run by this Python; else all ~/comfy/ComfyUI*.

    Where no Python is named, a checkout is run by its .venv if it has one, else by this Python.
    """
    if named := os.environ.get("COMFYUI_PATHS"):
        return [_host(*entry.split("=", 1)) for entry in named.split(os.pathsep)]
    found = find_comfyui()
    if "COMFYUI_PATH" in os.environ:
        return [Host(found, Path(sys.executable))] if found else []
    folders = sorted((Path.home() / "comfy").glob("ComfyUI*"))
    checkouts = [folder for folder in folders if (folder / "comfy" / "samplers.py").is_file()]
    return [_host(folder) for folder in dict.fromkeys([found, *checkouts] if found else checkouts)]


def _host(checkout: Path | str, python: Path | str | None = None) -> Host:
    own = Path(checkout, ".venv", "bin", "python")
    return Host(Path(checkout), Path(python or (own if own.exists() else sys.executable)))


HOSTS = find_hosts()
HERE = next((host for host in HOSTS if host.is_of_this_python), None)
"""The one that is tested in this process."""

if __name__ == "__main__":
    for each in HOSTS:
        print(f"found {each}, run by {each.python}")
    if not HOSTS:
        print("found no ComfyUI: its tests will skip")
    sys.exit(HERE is None)
