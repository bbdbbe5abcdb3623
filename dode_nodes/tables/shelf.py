"""The tables in some folders, as a choice among them needs them: every file is opened once, most are never parsed.

A first look at a file takes no more than reading it: it finds which families, solvers, numbers of steps, guidance and
patches are written in the header, and whether samples of the model's weights are. Only the likeliest files are then
loaded and checked.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import TableError
from . import safefile
from .families import family_of
from .gate import Facts
from .names import SUFFIX
from .table import LambdaTable

_FAMILY = b'\\"family\\": \\"'
_STEPS = re.compile(rb'\\"(?:steps|evaluations)\\": ?(?:([0-9]{1,4})|\[([0-9, ]{1,1200})\])')
_SOLVERS = re.compile(rb'\\"solver\\": ?\\"([^"\\]{1,102})\\"')
_CFG = re.compile(rb'\\"cfg(?:_range)?\\": ?\[?([0-9.e+-]{1,24})(?:, ?([0-9.e+-]{1,24})\])?')
_PATCHES = re.compile(rb'\\"patches\\": ?(\{[^{}]{0,4000}\})')
_SAMPLES_BEGIN = b'\\"samples\\": ['
_LONGEST_FAMILY = 101
_ROUND = 12
"""Tables of a family that are loaded at once for a choice."""
_MOST_KEPT = 64
"""Loaded tables; so many are looked at for a choice at most, so that the next one opens none."""
_SAMPLES = 4
_DEEPEST = 8


class _Stamp(NamedTuple):
    """Changes when a file does."""

    modified: int
    size: int
    inode: int


@dataclass
class _File:
    """What is known of one without loading it.

    Attributes:
        families: that are named in it; empty where none is found, so that it must be loaded to know.
        steps: numbers of steps that its rows may have.
        solvers: that its rows may serve.
        cfgs: guidance that its rows may have been made with.
        patches: on its model, as they are written.
        holds: by model, whether samples of the model's weights are in it.
        sha256: of its table, once that has been loaded.
        failed: why it could not be read.
    """

    stamp: _Stamp
    families: frozenset[str] = frozenset()
    steps: frozenset[int] = frozenset()
    solvers: frozenset[bytes] = frozenset()
    cfgs: tuple[float, ...] = ()
    patches: bytes = b""
    holds: dict[str, bool] = field(default_factory=dict)
    sha256: str = ""
    failed: str = ""
    read: bool = False


class Shelf:
    """All tables in folders.

    Args:
        folders: gives them, as they are at the moment; earlier ones go first.
    """

    def __init__(self, folders: Callable[[], Sequence[Path]]) -> None:
        self._folders = folders
        self._files: dict[str, _File] = {}
        self._loaded: dict[str, tuple[_Stamp, LambdaTable]] = {}

    @property
    def stamp(self) -> str:
        """Changes when a file is new, changed or gone. Opens none."""
        self._look()
        seen = "\n".join(f"{path} {each.stamp}" for path, each in self._files.items())
        return hashlib.sha256(seen.encode(errors="surrogatepass")).hexdigest()

    def likely(
        self, model: Facts, steps: int | None = None, solver: str | None = None, cfg: float | None = None
    ) -> Iterator[list[tuple[Path, LambdaTable]]]:
        """Tables that may be for this model, likeliest first, some at a time; of very many, the first.

        Args:
            model: facts about it, as a table keeps them.
            steps, solver, cfg: that a row should have, serve and have been made with.
        """
        self._look()
        family, marks = model.get("family"), _marks(model)
        key = hashlib.sha256(b"\n".join(marks)).hexdigest()
        for path, file in self._files.items():
            if not file.read or (key not in file.holds and _may_be(file, family)):
                self._read(path, file, family, key, marks)
        paths = [path for path, file in self._files.items() if not file.failed and _may_be(file, family)]
        patches = _quoted(model.get("patches"))
        named = None if solver is None else solver.encode(errors="replace")

        def unlikely(path: str) -> tuple[bool, bool, bool, float]:
            file = self._files[path]
            able = (steps is None or steps in file.steps) and (named is None or named in file.solvers)
            return not able, not file.holds.get(key), file.patches != patches, _cfg_distance(file.cfgs, cfg)

        paths.sort(key=unlikely)
        for some in _rounds(paths, lambda path: unlikely(path)[:2]):
            tables = ((path, self._table(path)) for path in some)
            yield [(Path(path), table) for path, table in tables if table is not None]

    def by_hash(self, digits: str, name: str) -> tuple[Path, LambdaTable] | None:
        """The table whose hash begins so; a file of this name, without ending, is looked at first."""
        self._look()
        for path in sorted(self._files, key=lambda path: Path(path).stem != name):
            file = self._files[path]
            if not file.failed and not file.sha256:
                self._table(path)
            if file.sha256 and file.sha256.startswith(digits) and (table := self._table(path)) is not None:
                return Path(path), table
        return None

    def _table(self, path: str) -> LambdaTable | None:
        """A file's table; None where it has none that can be read."""
        file = self._files[path]
        stamp, table = self._loaded.pop(path, (None, None))
        if table is None or stamp != file.stamp:
            try:
                table = LambdaTable.load(path)
            except TableError as error:
                file.failed = str(error)
                return None
        file.sha256 = table.sha256
        self._loaded[path] = file.stamp, table
        while len(self._loaded) > _MOST_KEPT:
            del self._loaded[next(iter(self._loaded))]
        return table

    def _look(self) -> None:
        """Which files there are."""
        found = dict(entry for folder in self._folders() for entry in _walk(folder, _DEEPEST))
        self._files = {
            path: old if (old := self._files.get(path)) is not None and old.stamp == stamp else _File(stamp)
            for path, stamp in found.items()
        }
        self._loaded = {path: each for path, each in self._loaded.items() if path in found}

    def _read(self, path: str, file: _File, family: Any, key: str, marks: Sequence[bytes]) -> None:
        try:
            header = safefile.read_header(path)
        except TableError as error:
            file.read, file.failed = True, str(error)
            return
        file.read = True
        words = _without_samples(header)
        named = (part[:_LONGEST_FAMILY].partition(b"\\")[0] for part in words.split(_FAMILY)[1:])
        file.families = frozenset(family_of(name.decode(errors="replace")) for name in named)
        if not _may_be(file, family):
            return
        file.steps = frozenset(
            int(one) if one else many.count(b",") + 1 for one, many in _STEPS.findall(words)
        )
        file.solvers = frozenset(_SOLVERS.findall(words))
        file.cfgs = tuple(filter(None, map(_number, itertools.chain(*_CFG.findall(words)))))
        found = _PATCHES.search(words)
        file.patches = b"" if found is None else found[1]
        file.holds[key] = any(mark in header for mark in marks)


def _without_samples(header: bytes) -> bytes:
    """Most of a header are samples of weights."""
    before, _, after = header.partition(_SAMPLES_BEGIN)
    return before + after[max(after.find(b"\\"), 0) :]


def _may_be(file: _File, family: Any) -> bool:
    return not file.families or family in file.families


def _rounds(paths: list[str], kind: Callable[[str], Any]) -> Iterator[list[str]]:
    """Some at a time. Few are all looked at; of many only one kind at once, for comparing weights takes long."""
    if len(paths) <= _ROUND:
        yield paths
        return
    for _, alike in itertools.groupby(paths[:_MOST_KEPT], kind):
        these = list(alike)
        yield from (these[i : i + _ROUND] for i in range(0, len(these), _ROUND))


def _cfg_distance(cfgs: Sequence[float], cfg: float | None) -> float:
    """To the nearest, as a ratio's logarithm."""
    if cfg is None or cfg <= 0:
        return 0.0
    return min((abs(math.log(each / cfg)) for each in cfgs), default=0.0)


def _number(text: bytes) -> float | None:
    """If it is one, and positive."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


def _quoted(facts: Any) -> bytes:
    """As a header has it: JSON within JSON."""
    return json.dumps(json.dumps(facts))[1:-1].encode()


def _marks(model: Facts) -> list[bytes]:
    """A few samples of the model's weights, as a table's JSON has them."""
    samples = model.get("fingerprint", {}).get("samples", [])
    return [json.dumps(sample).encode() for sample in samples[:: max(1, len(samples) // _SAMPLES)]]


def _walk(folder: Path | str, levels: int) -> Iterator[tuple[str, _Stamp]]:
    """The tables in a folder and those below it, in the order of their names."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        try:
            if entry.name.endswith(SUFFIX) and entry.is_file():
                status = entry.stat()
                yield entry.path, _Stamp(status.st_mtime_ns, status.st_size, status.st_ino)
            elif levels and not entry.name.startswith(".") and entry.is_dir():
                yield from _walk(entry.path, levels - 1)
        except OSError:  # gone meanwhile
            continue
