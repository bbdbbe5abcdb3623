"""Where λ tables lie, and which there are. Opens none of them."""

from __future__ import annotations

from pathlib import Path

from modules import paths

from ...tables.names import SUFFIX
from .names import AUTO, NONE

PACK_FOLDER = Path(__file__).resolve().parents[3] / "lambdas"
_DEMO = {PACK_FOLDER / f"demo_{kind}{SUFFIX}" for kind in ("eps", "flow", "pictures")}
"""For the demo models, which are ComfyUI's alone: nobody needs to see them here."""


def models_folder() -> Path:
    """The one that a ComfyUI with the same models folder reads, too."""
    return Path(paths.models_path) / "lambdas"


def folders() -> list[Path]:
    """All of them, the one that new tables are saved in first."""
    own = [models_folder()] if models_folder().is_dir() else []
    return [*own, PACK_FOLDER]


def trusted_file() -> Path:
    """Where it is noted which tables may be taken unasked."""
    return Path(paths.data_path) / "dode_nodes" / "trusted_tables.txt"


def choices() -> list[str]:
    """What there is to choose from: tables without ending, with / between folders."""
    return [AUTO, NONE, *_found()]


def path_of(name: str) -> Path | None:
    """The file of a listed name. Nothing else is opened, whatever a stranger's text names."""
    return _found().get(name)


def is_listed(path: Path | None) -> bool:
    """Whether a table lies where it is found by itself."""
    return path in _found().values()


def _found() -> dict[str, Path]:
    """By name; where two folders have it, the first."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted({*folder.rglob(f"*{SUFFIX}")} - _DEMO):
            found.setdefault(path.relative_to(folder).as_posix().removesuffix(SUFFIX), path)
    return found
