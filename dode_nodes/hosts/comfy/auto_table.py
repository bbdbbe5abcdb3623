"""The λ table that a node takes where none is connected."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import folder_paths
from comfy.model_patcher import ModelPatcher

from ...tables import auto
from ...tables.auto import Chosen, Wanted
from ...tables.shelf import Shelf
from ...tables.table import LambdaTable
from ...tables.trust import Trust, shipped_hashes
from . import table_files
from .model_facts import is_same, model_facts


@cache
def _shelf() -> Shelf:
    return Shelf(lambda: [Path(folder) for folder in folder_paths.get_folder_paths(table_files.FOLDER)])


@cache
def trust() -> Trust:
    """Which tables may be taken unasked, in ComfyUI's user folder."""
    path = Path(folder_paths.get_user_directory()) / "dode_nodes" / "trusted_tables.txt"
    return Trust(path, shipped_hashes(table_files.PACK_FOLDER / "README.md"))


def stamp() -> str:
    """Changes when another table might be chosen."""
    return f"{_shelf().stamp} {trust().stamp}"


def choose(
    model: ModelPatcher,
    *,
    preset: str,
    family_match: bool,
    steps: int | None = None,
    solver: str | None = None,
    cfg: float | None = None,
    latent: dict[str, Any] | None = None,
) -> Chosen:
    """The table that a graph is pinned to, else the best one for this model and these settings.

    Raises:
        DodeError: there is none; says what to do.
    """
    if preset.strip():
        return auto.pinned(_shelf(), trust(), preset)
    facts = model_facts(model)
    size = getattr((latent or {}).get("samples"), "shape", ())[2:]
    wanted = Wanted(facts, steps, solver, cfg, tuple(size) or None, family_match)
    return auto.choose(_shelf(), trust(), wanted, lambda theirs: is_same(theirs, model, facts))


def keep(table: LambdaTable) -> None:
    """The user has made this table, or picked it by name: it may be taken unasked."""
    trust().add(table)
