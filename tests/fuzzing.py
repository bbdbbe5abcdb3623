"""Files and codes that an enemy might make: mutated by their structure, so that many get past the first checks.

python -m tests.fuzzing bytes --count 1000000         # the reading of files
python -m tests.fuzzing codes --count 1000000         # the reading of codes
python -m tests.fuzzing import --count 10000          # import by the command line, and merging
python -m tests.fuzzing bytes --atheris -runs=1000000 # guided by coverage; pip install -e ".[fuzz]"

It counts what was accepted and refused, how many inputs came to the checks of a row, the slowest, and every error that is
no ``TableError``. The exit status is 1 if there was one, if an input took more than a second, or a file lies outside.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import math
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from dode_nodes.cli.commands import main as command_line
from dode_nodes.errors import DodeError, TableError
from dode_nodes.tables import code, edit
from dode_nodes.tables.free_outputs import FreeOutputs, GaussianPrior
from dode_nodes.tables.provenance import (
    Credit,
    Distances,
    HeldOutErrors,
    Lora,
    Origin,
    StockSetting,
    TrainedLora,
    Unseen,
)
from dode_nodes.tables.row import LambdaRow
from dode_nodes.tables.table import LambdaTable
from tests.tables.rows import refined_row, row_of

FILES = Path(__file__).parent / "tables" / "files"
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 255, 256, 257, 1.5, -0.0, 1e-320, 1e300, 65504, 65505, 2**63, 2**64, 10**400, "", "x",
    "euler", "ipndm", "<mine>", "<img src=x onerror=alert(1)>", "$\\frac{1}{2}$", "\u202egnp", "\x1b[2J", "a" * 101,
    "lambda", "history", "bands", "afs", "x_T", "gaussian-denoiser", "noise", "data",
    [], [0], [1, 1, 1], ["x"], {}, {"a": {}},
    math.inf, "0" * 64, "2026-01-31", "refined", "plain",
]  # fmt: skip
NUMBERS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-300,
    1e300,
    1000.0,
    1000.1,
    65504.0,
    65505.0,
    math.nan,
    math.inf,
    -math.inf,
    8.0,
]
ODD_ENTRIES: dict[str, list[Any]] = {
    "dtype": ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X"],
    "shape": [[], [0], [2**40], [-1], "x", [1.5]],
    "data_offsets": [[0], [0, 8], [8, 0], "x"],
}
SECONDS = 1.0


_TEXT = json.JSONEncoder().encode
_COMPACT = json.JSONEncoder(separators=(",", ":")).encode
_WORDS = {
    np.dtype(name): word
    for name, word in zip(
        ("f8", "f4", "f2", "i8", "u1", "?"), ("F64", "F32", "F16", "I64", "U8", "BOOL"), strict=True
    )
}


def tables() -> list[LambdaTable]:
    """Valid ones of all kinds: of each file two rows, alone and together; and small ones, which are quick, more often."""
    files = [
        LambdaTable.load(path) for path in sorted(FILES.glob("*.safetensors")) if "ends" not in path.stem
    ]
    small = [
        LambdaTable([row_of(error=0.1), refined_row()], {"family": "sdxl", "channels": 4}),
        whole_table(),
    ]
    pairs = [replace(table, rows=[table.rows[0], table.rows[-1]]) for table in files] + 3 * small
    return pairs + [replace(table, rows=[row]) for table in pairs for row in table.rows]


def whole_table() -> LambdaTable:
    """All that a table can have in it, a little of each."""
    distances = Distances(0.2, 0.2, 0.1, 0.3)
    told = row_of(
        errors=HeldOutErrors(4, (0.1, None, 0.2), 0.3, (0.2, None)),
        best_stock=StockSetting("deis, max_order 2", "karras", 0.2, 4, discard_penultimate=True, tried=9),
        unseen=Unseen(4, distances, distances, 0.75, 5),
        loras=[Lora("0" * 64, 0.5, "style")],
        trained_lora=TrainedLora("1" * 64, 0.75, 0.1, 0.2, 4, "few steps"),
        credit=Credit("a", "CC0", "of\nnote", "2026-01-31"),
        settings={
            "cfg": 2.0,
            "cfg_range": [1, 7.5],
            "steps": 3,
            "scheduler": "karras",
            "latent_shape": [4, 8, 8],
        },
        report={"refined": {"kept": "plain solver", "stages": [{"stage": "row given", "distance": 0.5}]}},
    )
    prior = GaussianPrior(np.zeros(2), np.stack([np.eye(2)] * 3))
    wide = row_of(
        weights=np.tril(np.ones((2, 3, 5)), 2), form="history", free=FreeOutputs(True, True, prior),
        origin=Origin("refined", "ipndm", {"max_order": 2}, [8.0, 3.0, 0.0]),
    )  # fmt: skip
    model = {
        "name": "model", "family": "sd15", "prediction_type": "epsilon", "channels": 4, "sigma_min": 0.02,
        "sigma_max": 15,
        "fingerprint": {"samples": [[0.5 * i for i in range(16)], [0.25] * 16], "ascending": 1},
        "patches": {"weights": 3, "strengths": [0.5], "content": "2" * 64},
    }  # fmt: skip
    return LambdaTable([told, wide], model)


def seeds() -> list[tuple[dict[str, Any], str, dict[str, np.ndarray]]]:
    """Of valid tables: their JSON, the same as text, and arrays."""
    found = []
    for table in tables():
        facts = {"model": dict(table.model), "rows": [row.to_json() for row in table.rows]}
        arrays = {
            f"rows.{i}.{name}": array
            for i, row in enumerate(table.rows)
            for name, array in row.arrays().items()
        }
        found.append((facts, _TEXT(facts), arrays))
    return found


def code_seeds() -> list[tuple[Any, bytes, bytes]]:
    """Of valid codes of one row: their JSON, the same as bytes, and those that follow it."""
    found = []
    for table in tables():
        if len(table.rows) == 1:
            samples = table.model.get("fingerprint", {}).get("samples", [])[:1]
            payload = code._packed(table, samples)[1 : -code._SUM_BYTES]
            end = 2 + int.from_bytes(payload[:2], "little")
            found.append((json.loads(payload[2:end]), payload[2:end], payload[end:]))
    return found


class Mutator:
    """Makes inputs of valid tables. The same seed makes the same inputs."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311
        self._seeds = seeds()
        self._codes = code_seeds()

    def _one(self, values: Any) -> Any:
        """Of a list or the like; Random.choice takes three times as long."""
        return values[int(self._random.random() * len(values))]

    def _whole(self, least: int, most: int) -> int:
        """From the least to the most."""
        return least + int(self._random.random() * (most + 1 - least))

    def file(self) -> bytes:
        """The bytes of a file; most are well-formed up to the checks of what is in it."""
        facts, text, arrays = self._one(self._seeds)
        if self.often(0.7):
            text = _TEXT(self._changed(facts))
        if changes := self._whole(0, 2):
            arrays = dict(arrays)
            for _ in range(changes):
                name = self._one(list(arrays))
                arrays[name] = self._array(arrays[name])
        version = self._one("2222222213")
        content = _file_of(text, arrays, version, self._entry if self.often(0.1) else None)
        return self._flipped(content) if self.often(0.2) else content

    def code(self) -> str:
        """A code, most of them with a sum that is right."""
        short, text, numbers = self._one(self._codes)
        if self.often(0.8):
            text = _COMPACT(self._changed(short)).encode()
        if self.often(0.3):
            numbers = self._flipped(numbers)
        payload = b"\1" + (len(text) % 2**16).to_bytes(2, "little") + text + numbers
        sealed: str = code._MARK + code._base62(payload + code._sum(payload))
        if self.often(0.1):
            at = self._whole(0, len(sealed) - 1)
            sealed = sealed[:at] + self._one("0zλ \n-") + sealed[at + self._whole(0, 2) :]
        return sealed

    def mutated_bytes(self, content: bytes) -> bytes:
        """A change of any bytes, for atheris: by their structure if they have one."""
        return self._flipped(content) if content and self.often(0.5) else self.file()

    def often(self, share: float) -> bool:
        """True for this share of the calls."""
        return self._random.random() < share

    def _changed(self, facts: Any) -> Any:
        """A copy with one to three values replaced, removed or new, anywhere in it; the given one stays as it is."""
        for _ in range(self._whole(1, 3)):
            facts = self._changed_once(facts)
        return facts

    def _changed_once(self, value: Any) -> Any:
        copy = value.copy()
        if not copy:
            return copy
        named = isinstance(copy, dict)
        key = self._one(list(copy)) if named else self._whole(0, len(copy) - 1)
        inner = copy[key]
        if inner and isinstance(inner, (dict, list)) and self.often(0.8):
            copy[key] = self._changed_once(inner)
        elif self.often(0.15):
            del copy[key]
        elif named and self.often(0.1):
            copy[self._one(("x", "requires", "loras", "credit", "errors", "\u202e"))] = self._one(ODD)
        else:
            copy[key] = self._one(ODD)
        return copy

    def _array(self, array: np.ndarray) -> np.ndarray:
        kind = self._whole(0, 5)
        if kind < 3:
            array = array.astype("f8")
            if array.size:
                array.flat[self._whole(0, array.size - 1)] = self._one(NUMBERS)
        elif kind == 3:
            array = array[..., : self._whole(0, max(1, array.shape[-1]))] if array.ndim else array
        elif kind == 4:
            with np.errstate(all="ignore"):
                array = array.astype(self._one(("f4", "i8", "u1", "bool", "f2")))
        else:
            array = array.reshape(self._one(((-1,), (1, -1), (-1, 1), (1, 1, -1))))
        return array

    def _entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        name = self._one(list(entry))
        return entry | {name: self._one(ODD_ENTRIES[name])}

    def _flipped(self, content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(self._whole(1, 4)):
            at = self._whole(0, len(changed) - 1) if changed else 0
            kind = self._whole(0, 3)
            if kind == 0:
                changed[at : at + self._whole(0, 9)] = b""
            elif kind == 1:
                changed[at:at] = self._random.randbytes(self._whole(1, 9))
            elif changed:
                changed[at] = self._whole(0, 255)
        return bytes(changed)


def _file_of(
    text: str,
    arrays: dict[str, np.ndarray],
    version: str,
    odd: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> bytes:
    """A safetensors file, written without looking at what is in it."""
    header: dict[str, Any] = {
        "__metadata__": {"format": "dode-lambda-table", "version": version, "table": text}
    }
    parts, end = [], 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        entry = {"dtype": _WORDS[array.dtype], "shape": array.shape, "data_offsets": (begin, end)}
        header[name] = entry if odd is None or parts else odd(entry)
        parts.append(array.tobytes())
    content = _TEXT(header).encode()
    return b"".join((len(content).to_bytes(8, "little"), content, *parts))


class Watch:
    """Counts what comes of inputs."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.slowest = 0.0
        self.failures: list[str] = []
        self._rows = 0

    @contextlib.contextmanager
    def on_rows(self) -> Any:
        """Notice inputs that come to the checks of a row."""
        read = LambdaRow.from_json.__func__

        def counted(cls: type[LambdaRow], facts: Any, arrays: Any) -> LambdaRow:
            self._rows += 1
            return read(cls, facts, arrays)

        LambdaRow.from_json = classmethod(counted)
        try:
            yield
        finally:
            LambdaRow.from_json = classmethod(read)

    def __call__(self, take: Callable[[Any], object], given: Any) -> None:
        """Let ``take`` have an input."""
        before, began = self._rows, time.process_time()
        try:
            take(given)
            self.counts["accepted"] += 1
        except TableError:
            self.counts["refused"] += 1
        except Exception:
            self.counts["foreign errors"] += 1
            self.failures.append(f"{given!r:.3000}\n{traceback.format_exc()}")
        self.counts["inputs"] += 1
        self.counts["came to a row"] += self._rows > before
        seconds = time.process_time() - began
        self.counts[f"longer than {SECONDS:g} s"] += seconds > SECONDS
        self.slowest = max(self.slowest, seconds)

    @property
    def is_clean(self) -> bool:
        """Whether nothing went wrong."""
        return not self.failures and not self.counts[f"longer than {SECONDS:g} s"]

    def __str__(self) -> str:
        share = self.counts["came to a row"] / max(1, self.counts["inputs"])
        told = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        return f"{told}; {share:.0%} came to a row; slowest {self.slowest:.3f} s"


def import_and_merge(folder: Path) -> Callable[[bytes], None]:
    """Import a file by the command line, and merge it with another."""
    source, target = folder / "source", folder / "lambdas"
    source.mkdir()
    other = LambdaTable([row_of()])

    def take(content: bytes) -> None:
        path = source / "../source/a b.safetensors"
        path.write_bytes(content)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = command_line(["import", str(path), "--to", str(target)])
        if status == 2:
            raise TableError("refused")
        assert status == 0
        with contextlib.suppress(DodeError):
            edit.signed(edit.merged([LambdaTable.load(path), other]), {"author": "me"}, over=False)
        for imported in target.iterdir():
            LambdaTable.load(imported)
            imported.unlink()

    return take


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("bytes", "codes", "import"))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--atheris", action="store_true", help="guided by coverage; further options are libFuzzer's"
    )
    options, others = parser.parse_known_args()
    if options.atheris:
        return _guided(options.what, options.seed, others)
    mutator, watch = Mutator(options.seed), Watch()
    with tempfile.TemporaryDirectory() as folder, watch.on_rows():
        take: Callable[[Any], object] = LambdaTable.from_bytes
        make: Callable[[], Any] = mutator.file
        if options.what == "codes":
            take, make = code.from_code, mutator.code
        elif options.what == "import":
            take = import_and_merge(Path(folder))
        for _ in range(options.count):
            watch(take, make())
        outside = sorted(
            str(path) for path in Path(folder).iterdir() if path.name not in ("source", "lambdas")
        )
    print(f"{options.what}, seed {options.seed}: {watch}; files outside: {len(outside)}")
    for failure in watch.failures[:5]:
        print(failure, file=sys.stderr)
    return 0 if watch.is_clean and not outside else 1


def _guided(what: str, seed: int, arguments: list[str]) -> int:
    import atheris

    mutator, watch = Mutator(seed), Watch()
    for each in gc.get_objects():
        if isinstance(each, FunctionType) and str(each.__module__).startswith("dode_nodes.tables"):
            atheris.instrument_func(each)

    def one(content: bytes) -> None:
        if what == "codes":
            watch(code.from_code, content.decode(errors="replace"))
        else:
            watch(LambdaTable.from_bytes, content)
        if not watch.is_clean:
            raise RuntimeError(f"{watch}\n{watch.failures}")  # libFuzzer keeps the input
        if watch.counts["inputs"] % 10_000 == 0:  # it ends the process without a word of ours
            print(f"{what}, atheris, seed {seed}: {watch}", flush=True)

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        if mutator.often(0.2):
            return atheris.Mutate(content, most)
        made = mutator.code().encode() if what == "codes" else mutator.mutated_bytes(content)
        return made[:most]

    with watch.on_rows():
        atheris.Setup([sys.argv[0], "-max_len=65536", *arguments], one, custom_mutator=mutate)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
