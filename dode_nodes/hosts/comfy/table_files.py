"""Where λ tables are saved and found."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import folder_paths
import yaml
from comfy.cli_args import args

from ...errors import TableError
from ...tables import publish
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


def place_for(name: str, ending: str = "") -> Path:
    """Where tables of this name are saved, without what a file's name has after it. Writability is tried.

    Args:
        name: as the user gave it, with or without .safetensors, with / for folders.
        ending: put after it.

    Raises:
        TableError: it is no name for a table, or the folder cannot be written.
    """
    stem = save_folder().joinpath(*parts_of(name))
    _try_writing(stem.parent)
    return stem.with_name(stem.name + ending)


def save(table: LambdaTable, stem: Path) -> Path:
    """Save a table that has cost work: in the place that was found for it, else in another folder.

    Returns:
        Where it is.

    Raises:
        TableError: it can be saved nowhere.
    """

    def save_in(folder: Path) -> Path:
        publish.try_writing(folder)
        return publish.first_free(_names(folder / stem.name, table), table.save)

    return publish.in_first([stem.parent, *_folders_of_last_resort()], save_in)


@dataclass(frozen=True)
class Saved:
    """What came of saving a table.

    Attributes:
        table: under the name that it was saved as.
        place: where it is; None if it could be saved nowhere.
        where: the same, in words.
        remarks: what the user should know, one line at most.
    """

    table: LambdaTable
    place: Path | None
    where: str
    remarks: list[str]


def save_if_possible(table: LambdaTable, stem: Path) -> Saved:
    """Save a table that a node gives out in any case: the work that it has cost is not lost with the place for it."""
    try:
        place = save(table, stem)
    except TableError as error:
        remarks = [f"not saved, so use the table before you close ComfyUI: {error}"]
        return Saved(table, None, f"Not saved: {error}", remarks)
    remarks = []
    if place.parent != stem.parent:
        remarks.append(f"could not write to {stem.parent}: the table is saved as {place} instead")
    return Saved(replace(table, name=place.stem), place, f"Saved as {place}", remarks)


def saved_as(table: LambdaTable, stem: Path) -> Path | None:
    """Where a table with these numbers was saved under this name; None where it was not."""
    path = next(_names(stem, table))
    try:
        return path if LambdaTable.load(path).sha256 == table.sha256 else None
    except TableError:
        return None


def _names(stem: Path, table: LambdaTable) -> Iterator[Path]:
    """NAME-1a2b3c4d, with digits of the numbers that are in it; NAME-1a2b3c4d_00001, …, as ComfyUI numbers pictures."""
    named = table.named(stem.name)
    yield stem.with_name(f"{named}{SUFFIX}")
    yield from (stem.with_name(f"{named}_{number:05}{SUFFIX}") for number in count(1))


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
        publish.try_writing(folder)
    except OSError as error:
        raise TableError(
            f"create the folder {_models_folder()}, or allow ComfyUI to write to {folder}: "
            f"λ tables cannot be saved there ({error.strerror or error})"
        ) from error
