"""A table as one line of letters and digits, to be shared without a file.

It holds, bit for bit, what sampling needs; and what choosing a table and a row needs: facts of the model and a few
samples of its weights, guidance, size, steps, and with several rows their errors. It has no report and no words.

``DODE1``, then a number in base 62, whose bytes are: 1; the length of the JSON in two bytes; the JSON; each row's numbers
in float64, without zeros among the weights; samples of weights in float32; and four bytes of the SHA-256 of all that.
Blanks and ends of lines do not count.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import DodeError, TableError
from . import safefile
from .free_outputs import ARRAYS
from .gate import SAMPLE_LENGTH, Facts
from .row import MAX_EVALUATIONS, LambdaRow
from .table import LambdaTable

LONGEST = 1_900
"""Characters: what a message in a chat may have."""

_MARK = "DODE1"
_ANY_MARK = re.compile(r"DODE[0-9]+")
_DIGITS = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_VALUE_OF = bytes.maketrans(_DIGITS, bytes(range(62)))
_DIGIT_OF = bytes.maketrans(bytes(range(62)), _DIGITS)
_TOGETHER = 10
"""Digits that are taken at once: their number fits 64 bits."""
_PLACES = 62 ** np.arange(_TOGETHER - 1, -1, -1)
_SUM_BYTES = 4
_MOST_SAMPLES = 8
_MOST_PASTED = 100_000
_LARGEST = float(np.finfo(np.float32).max)

_MODEL = {
    "f": "family", "p": "prediction_type", "c": "channels", "s": "shift", "l": "sigma_min", "h": "sigma_max",
}  # fmt: skip
_SETTINGS = {"c": "cfg", "t": "steps", "d": "scheduler", "z": "latent_shape"}
"""What is in the JSON, by its letters there."""


def to_code(table: LambdaTable) -> str:
    """The table as text, with as many samples of the weights as there is room for.

    Raises:
        DodeError: it is too long; says what to share instead.
    """
    samples = _spread(table.model.get("fingerprint", {}).get("samples", []))
    for count in range(len(samples), -1, -1):
        content = _packed(table, samples[:count])
        length = len(_MARK) + math.ceil((len(content) * 8 - 7) / math.log2(62))  # the first byte is 1
        if length <= LONGEST:
            return _MARK + _base62(content)
    rows = "this row" if len(table.rows) == 1 else f"these {len(table.rows)} rows"
    raise DodeError(
        f"share the file: {rows} would make a code of {length} characters, at most {LONGEST} are allowed"
    )


def from_code(text: str) -> LambdaTable:
    """The inverse of ``to_code``; whatever the text, nothing but its numbers is used.

    Raises:
        TableError: it is no such code, or was changed on its way.
    """
    if not isinstance(text, str) or len(text) > _MOST_PASTED:
        raise TableError(f"this is no λ code: a code has at most {LONGEST} characters")
    code = "".join(text.split())
    if not code.startswith(_MARK):
        later = _ANY_MARK.match(code)
        raise TableError(
            f"this code begins with {later[0][:12]}, and this version reads {_MARK}: update the pack"
            if later
            else f"this is no λ code: a code begins with {_MARK}"
        )
    if len(code) > LONGEST:
        raise TableError(
            f"this is no λ code: a code has at most {LONGEST} characters, this text has {len(code)}"
        )
    content = _bytes(code[len(_MARK) :])
    payload, check = content[:-_SUM_BYTES], content[-_SUM_BYTES:]
    if len(payload) < 3 or payload[0] != 1 or _sum(payload) != check:
        raise TableError("this λ code is incomplete, or a character of it is wrong: copy it again")
    try:
        return _unpacked(payload[1:])
    except DodeError as error:
        raise TableError(f"λ code: {error}") from error


def _spread(samples: list[list[float]]) -> list[list[float]]:
    """A few of them, that float32 holds: the first, the last, and what is between."""
    samples = [sample for sample in samples if max(map(abs, sample)) <= _LARGEST]
    if len(samples) <= _MOST_SAMPLES:
        return list(samples)
    return [samples[i * (len(samples) - 1) // (_MOST_SAMPLES - 1)] for i in range(_MOST_SAMPLES)]


def _packed(table: LambdaTable, samples: list[list[float]]) -> bytes:
    several = len(table.rows) > 1
    facts: dict[str, Any] = {
        "m": _short(_MODEL, table.model),
        "r": [_row_facts(row, with_errors=several) for row in table.rows],
    }
    if samples:
        facts["a"] = [len(samples), table.model["fingerprint"].get("ascending", 0)]
    text = json.dumps(facts, separators=(",", ":")).encode()
    numbers = b"".join(part for row in table.rows for part in _row_numbers(row))
    marks = np.array(samples, "<f4").tobytes()
    payload = b"\1" + len(text).to_bytes(2, "little") + text + numbers + marks
    return payload + _sum(payload)


def _unpacked(payload: bytes) -> LambdaTable:
    length = int.from_bytes(payload[:2], "little")
    try:
        facts = safefile.parse_json(payload[2 : 2 + length].decode())
        rows, short = facts["r"], facts["m"]
        model = {_MODEL[letter]: value for letter, value in short.items()}
        count, ascending = facts.get("a", [0, 0])
    except TableError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DodeError("it is not laid out as it should be") from None
    if not isinstance(rows, list):
        raise DodeError("it has no rows")
    numbers = _Numbers(payload[2 + length :])
    table_rows = [_row(row, numbers) for row in rows]
    if count:
        samples = numbers.take(_count(count), SAMPLE_LENGTH, dtype="<f4")
        model["fingerprint"] = {"samples": samples.tolist(), "ascending": ascending}
    numbers.check_end()
    return LambdaTable(table_rows, model)


def _row_facts(row: LambdaRow, *, with_errors: bool) -> dict[str, Any]:
    """What is not the default."""
    prior, origin = row.free.gaussian, row.origin
    facts = {
        "s": row.solver,
        "n": row.steps,
        "e": list(row.evaluations) if set(row.evaluations) != {1} else None,
        "p": row.prediction if row.prediction != "noise" else None,
        "q": row.requires,
        "w": row.bands if row.weights.ndim == 3 else None,
        "o": dict(row.solver_options) or None,
        "g": list(prior.spectrum.shape[:2]) if prior is not None else None,
        "k": origin.kind,
        "b": origin.solver,
        "i": dict(origin.solver_options) or None,
        "u": _short(_SETTINGS, row.settings) or None,
        "x": [row.errors.latents, list(row.errors.dode)] if with_errors and row.errors is not None else None,
    }
    return {letter: value for letter, value in facts.items() if value is not None}


def _row_numbers(row: LambdaRow) -> Iterator[bytes]:
    yield _doubles(row.sigmas[:-1])
    weights = row.weights[_places(row.weights.shape, row.form, row.free.columns)]
    there = np.ascontiguousarray(weights).view(np.int64) != 0  # a −0 is one, too
    yield np.packbits(there).tobytes()
    yield _doubles(weights[there])
    yield from (_doubles(row.free.arrays[name]) for name in ARRAYS if name in row.free.arrays)
    if row.origin.sigmas is not None:
        yield _doubles(row.origin.sigmas[:-1])


def _row(facts: Any, numbers: _Numbers) -> LambdaRow:
    """One row, checked as a file's is."""
    try:
        steps, requires = _count(facts["n"]), facts["q"]
        evaluations = facts.get("e", [1] * steps)
        total = sum(map(_count, evaluations))
        form, columns = requires[0], sum(name in requires for name in ("x_T", "gaussian-denoiser"))
        bands = facts.get("w")
        shape = (total,) if form == "lambda" else (total, columns + total)
        shape = shape if bands is None else (_count(bands), *shape)
        arrays = {
            "sigmas": numbers.schedule(steps),
            "weights": _weights(numbers, shape, form, columns),
        }
        if "g" in facts:
            knots, channels = map(_count, facts["g"])
            arrays |= {"mean": numbers.take(channels), "spectrum": numbers.take(knots, channels, channels)}
        origin: dict[str, Any] = {"kind": facts["k"]}
        if "b" in facts:
            began = numbers.schedule(steps - ("afs" in requires))
            origin |= {"solver": facts["b"], "solver_options": facts.get("i", {}), "sigmas": began.tolist()}
        latents, dode = facts.get("x", [0, []])
        settings = {_SETTINGS[letter]: value for letter, value in facts.get("u", {}).items()}
        whole = {
            "requires": requires,
            "solver": facts["s"],
            "evaluations": evaluations,
            "prediction": facts.get("p", "noise"),
            "form": form,
            "solver_options": facts.get("o", {}),
            "origin": origin,
            "settings": settings,
        }
    except DodeError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise DodeError("a row of it is not laid out as it should be") from None
    return LambdaRow.from_json(
        whole | ({"errors": {"latents": latents, "dode": dode}} if dode else {}), arrays
    )


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_EVALUATIONS:
        raise DodeError("a number in it is too large")
    return value


def _weights(numbers: _Numbers, shape: tuple[int, ...], form: str, columns: int) -> np.ndarray:
    weights = np.zeros(shape)
    places = _places(shape, form, columns)
    some = weights[places]
    there = numbers.bits(len(some))
    some[there] = numbers.take(int(there.sum()))
    weights[places] = some
    return weights


def _places(shape: tuple[int, ...], form: str, columns: int) -> np.ndarray:
    """Where a weight may be other than 0."""
    places = np.ones(shape, bool)
    return places if form == "lambda" else np.tril(places, columns)


class _Numbers:
    """The bytes that follow, taken one part after the other.

    Each part is compared with what is left before room is made for it.
    """

    def __init__(self, content: bytes) -> None:
        self._left = content

    def _bytes(self, count: int) -> bytes:
        if count > len(self._left):
            raise DodeError("it has too few numbers")
        part, self._left = self._left[:count], self._left[count:]
        return part

    def take(self, *shape: int, dtype: str = "<f8") -> np.ndarray:
        part = self._bytes(math.prod(shape) * np.dtype(dtype).itemsize)
        values: np.ndarray = np.frombuffer(part, dtype).reshape(shape).copy()
        return values

    def schedule(self, steps: int) -> np.ndarray:
        """So many σ, and the 0 that follows them."""
        sigmas = np.zeros(steps + 1)
        sigmas[:-1] = self.take(steps)
        return sigmas

    def bits(self, count: int) -> np.ndarray:
        part = np.frombuffer(self._bytes(-(-count // 8)), np.uint8)
        bits = np.unpackbits(part).astype(bool)
        if bits[count:].any():
            raise DodeError("it has bits that mean nothing")
        return bits[:count]

    def check_end(self) -> None:
        if self._left:
            raise DodeError("it has too many numbers")


def _short(letters: Mapping[str, str], facts: Facts) -> dict[str, Any]:
    return {letter: facts[name] for letter, name in letters.items() if facts.get(name) is not None}


def _doubles(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, "<f8").tobytes()


def _sum(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest()[:_SUM_BYTES]


def _base62(content: bytes) -> str:
    number, parts = int.from_bytes(content, "big"), []
    while number:
        number, part = divmod(number, 62**_TOGETHER)
        parts.append(part)
    values = np.array(parts[::-1], np.int64)[:, None] // _PLACES % 62
    return values.astype(np.uint8).tobytes().translate(_DIGIT_OF).decode().lstrip("0")


def _bytes(digits: str) -> bytes:
    if digits and not (digits.isascii() and digits.isalnum()):
        raise TableError("this λ code has other characters than letters and digits: copy it again")
    whole = digits.rjust(-(-len(digits) // _TOGETHER) * _TOGETHER, "0").encode()
    values = np.frombuffer(whole.translate(_VALUE_OF), np.uint8).reshape(-1, _TOGETHER)
    number = 0
    for part in (values @ _PLACES).tolist():
        number = number * 62**_TOGETHER + part
    return number.to_bytes(-(-number.bit_length() // 8), "big")
