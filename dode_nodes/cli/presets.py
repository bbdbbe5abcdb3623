"""The commands ``index`` and ``import``: a folder of presets with its page, and files that somebody shared."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import DodeError, TableError
from ..tables import gate, publish
from ..tables.code import from_code
from ..tables.describe import number
from ..tables.families import family_of
from ..tables.names import SUFFIX, parts_of
from ..tables.row import LambdaRow
from ..tables.table import LambdaTable

LAMBDAS = Path(__file__).resolve().parents[2] / "lambdas"
COMMUNITY = "community"
_PAGE = "README.md"
_BESIDE = (".png", ".md")
_MOST_BYTES = 512 * 2**10
"""Of a contribution's file."""
Named = tuple[str, LambdaTable]
"""A table, and its file's name in the folder."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>&~$])")


def add_index_options(parser: argparse.ArgumentParser) -> None:
    """Of ``index``."""
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=LAMBDAS,
        metavar="DIR",
        help="the folder (default: the pack's lambdas)",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; the exit status is 1 if a file is bad"
    )
    parser.set_defaults(run=_index)


def add_import_options(parser: argparse.ArgumentParser) -> None:
    """Of ``import``."""
    parser.add_argument(
        "shared", nargs="+", metavar="FILE|CODE", help="a .safetensors file, or a code (DODE1…)"
    )
    parser.add_argument(
        "--to",
        type=Path,
        default=LAMBDAS,
        metavar="DIR",
        help="folder for the tables (default: the pack's lambdas)",
    )
    parser.set_defaults(run=_import)


def _index(options: argparse.Namespace) -> int:
    """Check every file; write the page if all are good."""
    tables, bad = [], 0
    for path in _files(options.folder):
        name = path.relative_to(options.folder).as_posix()
        try:
            table = _checked(path, contributed=COMMUNITY in path.relative_to(options.folder).parts[:-1])
        except TableError as error:
            print(error)
            bad += 1
            continue
        if table is not None:
            tables.append((name, table))
            print(f"{name}: OK")
    if bad:
        print(f"{bad} of the files are bad: no page was written", file=sys.stderr)
        return 1
    if not options.check:
        publish.publish(
            options.folder / _PAGE, page(_listed(tables, options.folder)).encode(), overwrite=True
        )
    return 0


def _listed(tables: Sequence[Named], folder: Path) -> list[Named]:
    """Without those that git does not keep: what the pack's page lists is trusted, and others may lie there, too.

    Raises:
        DodeError: it is the pack's own folder, and no git is here that knows it.
    """
    kept = _kept_by_git(folder)
    if kept is None and folder.resolve() == LAMBDAS:
        raise DodeError("write the pack's page in a git checkout of it, or give another folder")
    left_out = [name for name, _ in tables if kept is not None and name not in kept]
    if left_out:
        print(
            f"not on the page, for git does not keep them (git add): {', '.join(left_out)}", file=sys.stderr
        )
    return [each for each in tables if each[0] not in left_out]


def _kept_by_git(folder: Path) -> set[str] | None:
    """The files in a folder; None where there is no git, or none that knows the folder."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), "ls-files", "-z"]
    try:
        found = subprocess.run(command, capture_output=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return set(os.fsdecode(found.stdout).split("\0"))


def _import(options: argparse.Namespace) -> int:
    """Copy tables into a folder, under safe names with digits of their numbers."""
    for shared in options.shared:
        if shared.startswith("DODE"):
            table, name = from_code(shared), "shared"
        else:
            table = LambdaTable.load(shared)
            name = _safe(Path(shared).stem)
        publish.try_writing(options.to)
        path = options.to / f"{table.named(name)}{SUFFIX}"
        print(publish.first_free(publish.numbered(path), table.save))
    return 0


def _safe(stem: str) -> str:
    """A name of letters, digits and dashes that means the same everywhere."""
    stem = re.sub(r"-[0-9a-f]{8}$", "", stem)
    safe = re.sub(r"[^\w-]+", "-", stem, flags=re.ASCII).strip("-")[:60] or "shared"
    try:
        return parts_of(safe)[0]
    except TableError:  # the name of a device
        return f"{safe}-table"


def _files(folder: Path) -> Iterator[Path]:
    """All of them, in the order of their names; hidden ones and links as well."""
    if not folder.is_dir():
        raise DodeError(f"there is no folder {folder}")
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(root, name) for name in sorted(names))


def _checked(path: Path, *, contributed: bool) -> LambdaTable | None:
    """A file's table; None for what may lie beside one.

    Raises:
        TableError: it may not be there, or is no table, or lacks what a contribution needs; says what to do.
    """
    if path.is_symlink():
        raise TableError(f"{path}: put the file itself here, not a link")
    if path.suffix in _BESIDE and path.stat().st_size <= _MOST_BYTES:
        return None
    if path.suffix != SUFFIX:
        raise TableError(f"{path}: only λ tables ({SUFFIX}) and small pictures belong here")
    table = LambdaTable.load(path)
    if contributed and (lack := _lack(path, table)):
        raise TableError(f"{path}: {lack}")
    return table


def _lack(path: Path, table: LambdaTable) -> str:
    """What a contribution must have that a table need not; "" where nothing is missing."""
    if not path.stem.endswith(table.named("")):
        return f"call it {table.named(_safe(path.stem))}{SUFFIX}, as Save λ table does"
    if path.stat().st_size > _MOST_BYTES:
        return f"share a smaller table: it has more than {_MOST_BYTES} bytes"
    if "family" not in table.model or "prediction_type" not in table.model:
        return "distil it in a host: the table does not say which family of models it is for"
    if not table.model.get("name"):
        return "set model_name in Save λ table"
    if any(row.credit is None or not (row.credit.author and row.credit.licence) for row in table.rows):
        return "set author and licence in Save λ table"
    if any(row.errors is None for row in table.rows):
        return "leave out rows without held-out errors"
    if any(row.is_callable for row in table.rows):
        return "leave out rows for a function of your own: nobody else has it"
    if _unknown(table):
        return "save it with Save λ table: it has fields that this version does not know"
    return ""


def _unknown(table: LambdaTable) -> bool:
    facts = [(table.model, gate.MODEL), *((row.settings, gate.SETTINGS) for row in table.rows)]
    whole = [
        table.unknown,
        table.unknown_arrays,
        *(each for row in table.rows for each in (row.unknown, row.unknown_arrays)),
    ]
    return any(whole) or any(facts.keys() - known.keys() for facts, known in facts)


def page(tables: Sequence[Named]) -> str:
    """The tables of a folder, a line for each row, as Markdown. Words of strangers are text in it."""
    lines = [
        "# λ tables",
        "",
        "Written by `python -m dode_nodes index`. Errors are RMS distances to the teacher on held-out latents, as the "
        "author measured them; in brackets the best stock setting's.",
        "",
        "| file | model | family | solver | steps | error | cfg | licence |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(name, table, row) for name, table in tables for row in table.rows),
        "",
        "SHA-256 of the numbers:",
        "",
        *(f"- {_text(name)}: `{table.sha256}`" for name, table in tables),
        "",
    ]
    return "\n".join(lines)


def _line(name: str, table: LambdaTable, row: LambdaRow) -> str:
    solver = f"{row.plain.solver}, refined" if row.is_refined else row.solver
    error = number(None if row.errors is None else row.errors.dode[0])
    stock = f" ({number(row.best_stock.error)})" if row.best_stock is not None else ""
    cfg = row.settings.get("cfg_range", [row.settings.get("cfg")])
    licence = "" if row.credit is None else row.credit.licence
    cells = [
        name, table.model.get("name", ""), family_of(table.model.get("family", "")), solver, str(row.paid_steps),
        error + stock, "–".join(f"{value:g}" for value in cfg if value is not None), licence,
    ]  # fmt: skip
    return "| " + " | ".join(map(_text, cells)) + " |"


def _text(words: str) -> str:
    return _MARKDOWN.sub(r"\\\1", words)
