"""Run by ComfyUI-Manager, and by the WebUI at every start: says whether the pack can work here.

It installs and changes nothing: requirements.txt names the one package that ComfyUI lacks, and the WebUI has all.
"""

from __future__ import annotations

import importlib.metadata
import sys

PYTHON = (3, 10)
TORCH = (2, 1)


def problems() -> list[str]:
    """What is missing, one line each, with what to do about it."""
    found = []
    if sys.version_info < PYTHON:
        found.append(f"Python {PYTHON[0]}.{PYTHON[1]} or newer is needed, this is {sys.version.split()[0]}")
    try:
        version = importlib.metadata.version("torch")
        if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < TORCH:
            found.append(
                f"torch {TORCH[0]}.{TORCH[1]} or newer is needed, this is {version}: update your host"
            )
    except importlib.metadata.PackageNotFoundError:
        found.append("torch is not installed in this Python: run install.py with your host's own Python")
    try:
        importlib.metadata.version("matplotlib")
    except importlib.metadata.PackageNotFoundError:
        found.append("matplotlib is missing, the report pictures need it: pip install -r requirements.txt")
    return found


if __name__ == "__main__":
    for line in problems() or ["everything it needs is here"]:
        print(f"D-ODE nodes: {line}")
