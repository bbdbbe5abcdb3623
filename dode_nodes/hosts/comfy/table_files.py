"""Where λ tables are saved and found."""

from __future__ import annotations

import os
import tempfile
from itertools import chain, count
from pathlib import Path

import folder_paths
import yaml
from comfy.cli_args import args

from ...errors import TableError
from ...tables import safefile
from ...tables.names import SUFFIX, parts_of
from ...tables.table import LambdaTable

FOLDER = "lambdas"
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
        TableError: it is no name for a table, or the folder cannot be written.
    """
    path = _untaken(save_folder().joinpath(*parts_of(name)), ending)
    _try_writing(path.parent)
    return path


def save(table: LambdaTable, path: Path) -> Path:
    """Save a table that has cost work: under the name that was free, else under another, else in another folder.

    Returns:
        Where it is.

    Raises:
        TableError: it can be saved nowhere.
    """
    places = [path, _untaken(path.with_suffix(""))]
    places += [_untaken(folder / path.stem) for folder in _folders_of_last_resort()]
    failures = []
    for place in places:
        try:
            safefile.try_writing(place.parent)
            return table.save(place)
        except (TableError, OSError) as error:
            failures.append(str(error))
    raise TableError(f"the table could not be saved: {failures[0]}")


def _untaken(stem: Path, ending: str = "") -> Path:
    """A file name that is free: NAME, NAME_00001, …, as ComfyUI numbers pictures."""
    names = chain([""], (f"_{number:05}" for number in count(1)))
    paths = (stem.with_name(f"{stem.name}{ending}{number}{SUFFIX}") for number in names)
    return next(path for path in paths if not path.exists())


def _folders_of_last_resort() -> list[Path]:
    return [
        save_folder(), _models_folder(), PACK_FOLDER, Path(folder_paths.get_output_directory()),
        Path(tempfile.gettempdir()),
    ]  # fmt: skip


def save_folder() -> Path:
    """The folder the user made default, else models/lambdas if it exists, else the pack's lambdas/."""
    default = _default_folder()
    if default is not None:
        return default
    return _models_folder() if _models_folder().is_dir() else PACK_FOLDER


def _models_folder() -> Path:
    return Path(folder_paths.models_dir) / FOLDER


def _default_folder() -> Path | None:
    """The last ``lambdas`` line of the last section with ``is_default`` in ComfyUI's extra_model_paths files.

    So ComfyUI has it: every default goes before those that it has read. It keeps their order, but not whether the
    first of them was made the default.
    """
    own = Path(folder_paths.__file__).parent / "extra_model_paths.yaml"
    given = [file for files in (args.extra_model_paths_config or []) for file in files]
    default = None
    for file in [own, *map(Path, given)]:
        if not file.is_file():
            continue
        sections = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        for section in sections.values():
            if isinstance(section, dict) and section.get("is_default") and section.get(FOLDER):
                base = os.path.expandvars(os.path.expanduser(section.get("base_path") or ""))
                last = [line for line in section[FOLDER].split("\n") if line][-1]
                default = Path(os.path.normpath(file.parent / base / last))
    return default


def _try_writing(folder: Path) -> None:
    try:
        safefile.try_writing(folder)
    except OSError as error:
        raise TableError(
            f"create the folder {_models_folder()}, or allow ComfyUI to write to {folder}: "
            f"λ tables cannot be saved there ({error.strerror or error})"
        ) from error
