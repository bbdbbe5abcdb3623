"""No file takes much memory or time, whether it is a table or is refused."""

from __future__ import annotations

import json
import struct
import sys
import time
import tracemalloc
from contextlib import suppress
from types import FrameType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from dode_nodes.errors import TableError
from dode_nodes.tables import safefile
from dode_nodes.tables.row import LambdaRow
from dode_nodes.tables.table import LambdaTable
from tests.tables.rows import SIGMAS, changed, row_of

MEMORY = 64e6


def with_facts(text: str, arrays: dict[str, np.ndarray] | None = None) -> bytes:
    return save(arrays or {}, {"format": "dode-lambda-table", "version": "2", "table": text})


def row_text(**facts: object) -> str:
    return json.dumps(changed(**facts)["rows"][0])


def many(item: str, text: str = "[%s]") -> str:
    """As many of an item as a file's header holds, or as values are allowed."""
    count = (
        min(safefile.MAX_VALUES // (sum(map(item.count, ",[{")) + 1), safefile.MAX_HEADER // len(item)) - 100
    )
    return text % ",".join([item] * count)


def widest_row() -> bytes:
    n = 250
    table = LambdaTable(
        [row_of(sigmas=np.linspace(1, 0, n + 1), weights=np.tri(n)[None].repeat(4, 0), form="history")]
    )
    arrays = {f"rows.0.{name}": array for name, array in table.rows[0].arrays().items()}
    arrays |= {f"x{i}": np.zeros(2**19) for i in range(1)}
    return with_facts(json.dumps({"rows": [row.to_json() for row in table.rows]}), arrays)


def widest_prior() -> bytes:
    channels = 250
    arrays = {
        "rows.0.sigmas": np.array(SIGMAS), "rows.0.weights": np.tri(3)[None, :, :].repeat(1, 0),
        "rows.0.mean": np.zeros(channels), "rows.0.spectrum": np.eye(channels)[None].repeat(16, 0),
    }  # fmt: skip
    return with_facts(json.dumps(changed(requires=["history", "gaussian-denoiser"], form="history")), arrays)


ROW = {f"rows.0.{name}": array for name, array in row_of().arrays().items()}
WORST = {
    "empty objects": lambda: with_facts(many("{}")),
    "empty lists": lambda: with_facts(many("[]")),
    "objects": lambda: with_facts(many('{"a":0}')),
    "objects of many fields": lambda: with_facts(many('{"a":0,"b":0,"c":0,"d":0,"e":0,"f":0}')),
    "rows": lambda: with_facts(many("{}", '{"rows":[%s]}')),
    "a field of a row": lambda: with_facts(
        json.dumps({"rows": [json.loads(row_text()) | {"x": json.loads(many('{"a":{}}'))}]}), ROW
    ),
    "wide text": lambda: with_facts(
        json.dumps(
            {"rows": [json.loads(row_text()) | {"x": "\N{GRINNING FACE}" * 250_000}]}, ensure_ascii=False
        ),
        ROW,
    ),
    "numbers": lambda: with_facts(
        json.dumps({"rows": [json.loads(row_text()) | {"x": json.loads(many("1e9"))}]}), ROW
    ),
    "large arrays": lambda: save({f"x{i}": np.zeros(2**17 - 64) for i in range(8)}, {"format": "x"}),
    "many arrays": lambda: save({f"x{i}": np.zeros(1) for i in range(4096)}, {"format": "x"}),
    "a header of arrays": lambda: _header_only({f"{i}": {} for i in range(100_000)}),
    "the widest row": widest_row,
    "the widest prior": widest_prior,
}


def _header_only(header: dict[str, object]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("content", WORST.values(), ids=WORST)
def test_memory_and_time_are_bounded(tmp_path, content):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content())
    assert path.stat().st_size <= safefile.MAX_BYTES
    began = time.process_time()
    with suppress(TableError):
        LambdaTable.load(path)
    assert time.process_time() - began < 5
    tracemalloc.start()
    try:
        with suppress(TableError):
            LambdaTable.load(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= MEMORY, f"{peak / 1e6:.0f} MB"


def test_the_widest_files_are_tables(tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(widest_row())
    assert LambdaTable.load(path).rows[0].bands == 4
    path.write_bytes(with_facts(json.dumps({"rows": [json.loads(row_text()) | {"x": [0] * 100_000}]}), ROW))
    assert LambdaTable.load(path).rows


# --- The work grows as the file does ------------------------------------------------------------------


def some_rows(n: int) -> bytes:
    return _file([row_of(error=0.1, settings={"steps": i + 1, "cfg": 7.0}) for i in range(n)])


def some_fields(n: int) -> bytes:
    return _file([row_of(unknown={f"x{i}": {"a": [i, str(i)]} for i in range(10 * n)})])


def some_samples(n: int) -> bytes:
    return _file([row_of()], fingerprint={"samples": [[i / 7] * 16 for i in range(n)], "ascending": 0})


def some_arrays(n: int) -> bytes:
    return save({f"x{i}": np.zeros(4) for i in range(10 * n)} | ROW, _facts_of([row_of()]))


def _facts_of(rows: list[LambdaRow], **model: object) -> dict[str, str]:
    text = json.dumps({"model": model, "rows": [row.to_json() for row in rows]})
    return {"format": "dode-lambda-table", "version": "2", "table": text}


def _file(rows: list[LambdaRow], **model: object) -> bytes:
    arrays = {f"rows.{i}.{name}": array for i, row in enumerate(rows) for name, array in row.arrays().items()}
    return save(arrays, _facts_of(rows, **model))


def work_of(content: bytes) -> int:
    """Lines of Python that reading runs, and calls, those into C among them."""
    counted = 0

    def called(frame: FrameType, event: str, argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    def ran(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal counted
        counted += event == "line"
        return ran

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(ran)
    sys.setprofile(called)
    try:
        LambdaTable.from_bytes(content)
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    return counted


@pytest.mark.parametrize("of", [some_rows, some_fields, some_samples, some_arrays])
def test_reading_is_linear(of):
    """Twice as much takes twice the work at most, and what is there anyway."""
    sizes = 10, 20, 40
    contents = [of(n) for n in sizes]
    bare, work = work_of(of(1)), [work_of(content) for content in contents]
    assert len(contents[2]) > 1.5 * len(contents[1]) > 2 * len(contents[0])
    assert work[1] - bare <= 2.2 * (work[0] - bare) + 50, work
    assert work[2] - bare <= 2.2 * (work[1] - bare) + 50, work
