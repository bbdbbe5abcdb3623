"""A LoRA on its way, on the command line: whatever model it is for, its files are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..fit.lora_pipeline import Outcome
from ..tables.lora_file import Factors, content_hash, write_lora
from ..tables.publish import first_free, numbered
from ..tables.row import LambdaRow
from ..tables.table import LambdaTable


class LoraWork(Protocol):
    """A training that can be ended at any time."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the model."""

    @property
    def rows(self) -> Sequence[LambdaRow]:
        """What there is of rows."""

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """What there is of results."""

    def run(self) -> None:
        """All of it."""

    def factors(self) -> dict[str, Factors]:
        """The LoRA by the names of ComfyUI's layers, if it makes a row better; else nothing."""

    def report(self) -> str:
        """What came of it, in words."""


def lora_beside(table: Path) -> Path:
    """Where the LoRA of a table is written."""
    return table.with_stem(f"{table.stem}-lora")


def save(work: LoraWork, out: Path) -> list[Path]:
    """The table of what rows there are and, if it makes one of them better, the LoRA; where they are."""
    rows, saved = list(work.rows), list[Path]()
    if factors := work.factors():
        lora = first_free(numbered(lora_beside(out)), lambda path: write_lora(path, factors))
        rows = [each.named(content_hash(factors), lora.name) for each in work.outcomes]
        saved.append(lora)
    if rows:
        table = LambdaTable(rows, model=work.facts)
        saved.insert(0, first_free(numbered(out), table.save))
    return saved
