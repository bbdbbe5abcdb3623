"""Where λ tables lie: the one module that knows."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths
import yaml
from comfy.cli_args import args

from ...errors import TableError
from ...tables import safefile
from ...tables.table import LambdaTable

FOLDER = "lambdas"
SUFFIX = ".safetensors"
PACK_FOLDER = Path(__file__).resolve().parents[3] / FOLDER


def register_folder() -> None:
    """Make ``lambdas`` a model folder: the pack's, models/lambdas, and what extra_model_paths.yaml adds."""
    folder_paths.add_model_folder_path(FOLDER, str(_models_folder()))
    folder_paths.add_model_folder_path(FOLDER, str(PACK_FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {SUFFIX})  # a new name accepts every extension


def names() -> list[str]:
    """The tables there are, for a drop-down."""
    return folder_paths.get_filename_list(FOLDER)


def load(name: str) -> LambdaTable:
    """A table by its name in the drop-down.

    Raises:
        TableError: there is none of that name, or its file is unusable.
    """
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise TableError(f"there is no λ table '{name}' in {folder_paths.get_folder_paths(FOLDER)}")
    return LambdaTable.load(path)


def stamp(name: str) -> str:
    """Changes when the file does."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        return "missing"
    status = os.stat(path)
    return f"{status.st_mtime_ns} {status.st_size}"


def free_path(name: str, ending: str = "") -> Path:
    """Where a new table of this name will be saved; a taken name gets _00001. Writability is tried.

    Args:
        name: as the user gave it, with or without .safetensors, with / for folders.
        ending: of the file's name, put after it.

    Raises:
        TableError: the name leads out of the folder, or the folder cannot be written.
    """
    clean = name.strip().removesuffix(SUFFIX)
    parts = Path(clean).parts
    if not clean or Path(clean).is_absolute() or ".." in parts or re.search(r'[<>:"|?*\x00-\x1f]', clean):
        raise TableError(
            f"'{name}' is not a name for a table: use letters, digits, - and _, and / for folders"
        )
    folder = save_folder()
    path = folder / f"{clean}{ending}{SUFFIX}"
    number = 0
    while path.exists():
        number += 1
        path = folder / f"{clean}{ending}_{number:05}{SUFFIX}"
    _try_writing(path.parent)
    return path


def save_folder() -> Path:
    """The folder the user made default, else models/lambdas if it exists, else the pack's lambdas/."""
    default = _default_folder()
    if default is not None:
        return default
    return _models_folder() if _models_folder().is_dir() else PACK_FOLDER


def _models_folder() -> Path:
    return Path(folder_paths.models_dir) / FOLDER


def _default_folder() -> Path | None:
    """The first ``lambdas`` of a section with ``is_default`` in ComfyUI's extra_model_paths files.

    ComfyUI keeps the order of the folders, but not whether the first of them was made the default.
    """
    own = Path(folder_paths.__file__).parent / "extra_model_paths.yaml"
    given = [file for files in (args.extra_model_paths_config or []) for file in files]
    for file in [own, *map(Path, given)]:
        if not file.is_file():
            continue
        sections = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        for section in sections.values():
            if isinstance(section, dict) and section.get("is_default") and section.get(FOLDER):
                base = os.path.expandvars(os.path.expanduser(section.get("base_path") or ""))
                first = next(line for line in section[FOLDER].split("\n") if line)
                return Path(os.path.normpath(file.parent / base / first))
    return None


def _try_writing(folder: Path) -> None:
    try:
        safefile.try_writing(folder)
    except OSError as error:
        raise TableError(f"λ tables cannot be saved in {folder}: {error.strerror or error}") from error
