"""The gate: the facts in a row or a table are checked here, once. No other code checks them again.

A file may come from a stranger. A field that this version knows must have the right type, or the file is refused.
A field that it does not know is kept and saved again, and has no effect.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import DodeError

Facts = Mapping[str, Any]
Check = Callable[[Any], bool]

LARGEST_NUMBER = 65_504
"""float16's largest. No network's σ comes near it, and no number of a latent."""
LARGEST_WEIGHT = 1_000
"""|λ|, and the sum of the |weights| of one evaluation."""
_MOST_DIGITS = 2**63
_LONGEST_LINE = 200
_LONGEST_TEXT = 10_000
_LONGEST_LIST = 1_000
_MOST_AXES = 8
_DEEPEST = 32
_MOST_BITS = 4_096
SAMPLE_LENGTH = 16
"""Numbers in a sample of a model's weights."""
_NAME = re.compile(r"[\w(\[+*.~@#](?:[\w .,:;+\-*/()\[\]=%#@|~!?]{0,99})")
_STEERING = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb]"
)
"""What moves a cursor, turns the direction of writing, or is half a character; not the end of a line."""


def is_number(value: Any) -> bool:
    """A finite number that can be formatted: JSON's whole numbers may have thousands of digits."""
    return (isinstance(value, float) and math.isfinite(value)) or (
        type(value) is int and abs(value) < _MOST_DIGITS
    )


def finite(value: float | None) -> float | None:
    """A number as a report may hold it: JSON has no NaN and no infinity."""
    return None if value is None or not math.isfinite(value) else float(value)


def is_count(value: Any) -> bool:
    """A whole number from 0 on."""
    return type(value) is int and 0 <= value < 2 * _MOST_DIGITS  # seeds have 64 bits


def is_name(value: Any) -> bool:
    """A word or a few that name something: short, no markup, no formula. ``<word>`` stands for a function."""
    if not isinstance(value, str) or len(value) > 102:
        return False
    if value.startswith("<") and value.endswith(">"):
        return value[1:-1].isidentifier()
    return _NAME.fullmatch(value) is not None


def is_text(value: Any) -> bool:
    """Words for people, in lines. They are shown as text, never as markup."""
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT and not _STEERING.search(value)


def is_line(value: Any) -> bool:
    """A few words for people."""
    return is_text(value) and len(value) <= _LONGEST_LINE and "\n" not in value


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= _LONGEST_LIST and all(map(check, value))


def _object_of(checks: Mapping[str, Check]) -> Check:
    """An object whose known fields, where they are there, are what they should be."""
    return lambda value: (
        isinstance(value, dict) and all(check(value[name]) for name, check in checks.items() if name in value)
    )


def _positive(check: Check) -> Check:
    return lambda value: check(value) and value > 0


def _not_negative(check: Check) -> Check:
    return lambda value: check(value) and value >= 0


def is_hexadecimal(count: int) -> Check:
    """The first of a hash, or all: hexadecimal, in lower case."""
    return lambda value: isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{count}}}", value) is not None


_any_number = _optional(is_number)

SETTINGS: Mapping[str, Check] = {
    "cfg": _not_negative(is_number),
    "seed": is_count,
    "steps": _positive(is_count),
    "scheduler": is_name,
    "schedule": is_name,
    "latent_shape": lambda value: (
        _list_of(_positive(is_count))(value) and len(value) <= _MOST_AXES and max(value, default=0) < 2**20
    ),
    "dtype": is_name,
    "latents": is_count,
    "groups": is_count,
    "prompts": is_count,
    "teacher": is_name,
    "teacher_cfg": _not_negative(is_number),
    "scale": _positive(is_count),
    "host": is_name,
    "host_version": is_name,
    "package_version": is_name,
    "cfg_range": lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and all(map(is_number, value))
        and 0 <= value[0] <= value[1]
    ),
}
"""What a row was made with."""

MODEL: Mapping[str, Check] = {
    "name": is_line,
    "autov2": is_hexadecimal(10),
    "kind": is_name,
    "family": is_name,
    "prediction_type": is_name,
    "channels": _positive(is_count),
    "shift": _any_number,
    "sigma_min": _any_number,
    "sigma_max": _any_number,
    "fingerprint": _object_of(
        {
            "samples": _list_of(lambda value: _list_of(is_number)(value) and len(value) == SAMPLE_LENGTH),
            "ascending": is_count,
            "layout": is_name,
            "values": _list_of(_any_number),
            "more_values": _list_of(_any_number),
        }
    ),
    "patches": _object_of(
        {"weights": is_count, "strengths": _list_of(is_number), "content": is_hexadecimal(64)}
    ),
}
"""What is known of a table's model."""

_STAGE = _object_of(
    {
        "stage": is_name,
        "fitted_error": _any_number,
        "held_out_error": _any_number,
        "distance": _any_number,
        "evaluations": is_count,
    }
)

REPORT: Mapping[str, Check] = {
    "fitted_latents": is_count,
    "held_out_latents": is_count,
    "checked": lambda value: isinstance(value, bool),
    "teacher_error": _any_number,
    "lambda_standard_error": _list_of(_optional(_not_negative(is_number))),
    "undetermined": _list_of(is_count),
    "shrunk_to": is_number,
    "after_steps": _object_of({"stock": _list_of(_any_number), "dode": _list_of(_any_number)}),
    "refined": _object_of(
        {
            "kept": is_name,
            "stages": lambda value: _list_of(_STAGE)(value) and all("stage" in stage for stage in value),
            "interrupted": lambda value: isinstance(value, bool),
        }
    ),
    "evaluations": lambda value: isinstance(value, dict) and all(map(is_count, value.values())),
}
"""What was measured, for people: nothing of it decides how a row is sampled."""


def checked(facts: Facts, known: Mapping[str, Check], what: str) -> Facts:
    """A detached, read-only copy of facts, the known ones among them checked.

    Args:
        facts: as JSON can hold them.
        known: a check for each field that has a meaning.
        what: whose facts, for the error.

    Raises:
        DodeError: JSON cannot hold them, or one is not what its name says.
    """
    copy = json_object(facts, what)
    for name, check in known.items():
        if name in copy and not check(copy[name]):
            raise DodeError(f"{what}: '{name}' cannot be {shortened(copy[name])}")
    return copy


def only_known(facts: Facts, known: Mapping[str, Check]) -> dict[str, Any]:
    """Without the fields that this version does not know."""
    return {name: value for name, value in facts.items() if name in known}


def json_object(value: Mapping[str, Any], what: str) -> Facts:
    """A detached, read-only copy of what JSON can hold.

    Raises:
        DodeError: it cannot, or is nested too deeply to be walked through.
    """
    if not isinstance(value, Mapping):
        raise DodeError(f"{what} must be an object")
    try:
        copy = _copied(dict(value), _DEEPEST)
    except (TypeError, ValueError) as error:
        raise DodeError(f"{what} cannot be stored as JSON: {error}") from error
    return MappingProxyType(copy)


def _copied(value: Any, levels: int) -> Any:
    """As json.loads(json.dumps(value)) has it; that takes five times as long for the thousands of numbers of a model."""
    if not levels:
        raise ValueError(f"nested more than {_DEEPEST} deep")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not JSON")
        return float(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list | tuple):
        return [_copied(item, levels - 1) for item in value]
    if isinstance(value, int):
        if value.bit_length() > _MOST_BITS:
            raise ValueError("a number has more than a thousand digits")
        return int(value)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{type(value).__name__}, or a field that is not named by text")
    return {str(key): _copied(item, levels - 1) for key, item in value.items()}


def numbers(value: Any, what: str) -> np.ndarray:
    """A detached, read-only copy in float64.

    Raises:
        DodeError: they are no numbers, or not all finite.
    """
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DodeError(f"{what} must be numbers: {error}") from error
    if not np.isfinite(array).all():
        raise DodeError(f"{what} has NaN or infinite entries")
    array.flags.writeable = False
    return array


def foreign_arrays(values: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Detached, read-only copies of arrays that this version knows nothing about, as they are.

    Raises:
        DodeError: one holds something other than numbers.
    """
    copies = {name: np.array(value) for name, value in values.items()}
    for name, copy in copies.items():
        if copy.dtype.kind not in "fiub":
            raise DodeError(f"the array '{name}' must hold numbers, not {copy.dtype}")
        copy.flags.writeable = False
    return MappingProxyType(copies)


def check_schedule(sigmas: np.ndarray, what: str) -> None:
    """Refuse σ that do not descend to 0, or begin where no network does.

    Raises:
        DodeError: they do not.
    """
    if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[-1] != 0 or not _descend(sigmas):
        raise DodeError(f"{what} must descend to 0, with no value repeated")
    if sigmas[0] > LARGEST_NUMBER:
        raise DodeError(f"{what} must be at most {LARGEST_NUMBER:,}; the first is {sigmas[0]:g}")
    if not _descend(sigmas.astype(np.float32)):  # as samplers get them
        raise DodeError(f"{what} must descend to 0, with no value repeated in single precision")


def _descend(values: np.ndarray) -> bool:
    return bool((values[1:] < values[:-1]).all())


def check_size(values: np.ndarray, what: str) -> None:
    """Refuse numbers that no latent has.

    Raises:
        DodeError: one is larger than float16's largest.
    """
    if np.abs(values).max(initial=0) > LARGEST_NUMBER:
        raise DodeError(f"{what} must have numbers of at most {LARGEST_NUMBER:,}")


def check_weights(weights: np.ndarray, form: str) -> None:
    """Refuse weights that no fit has found: |λ| and Σ_j |W_kj| are at most 1000.

    Args:
        weights: ``[E]``, ``[E, E]`` or ``[P, E, F + E]``; finite.

    Raises:
        DodeError: one is larger.
    """
    if form == "lambda":
        largest = np.abs(weights).max(initial=0)
    else:
        with np.errstate(over="ignore"):
            largest = np.abs(weights).sum(axis=-1).reshape(-1, weights.shape[-2]).sum(axis=0).max(initial=0)
    if largest > LARGEST_WEIGHT:
        what = "λ" if form == "lambda" else "the weights of one evaluation together"
        raise DodeError(f"{what} must be at most {LARGEST_WEIGHT:g}; got {largest:g}")


def shortened(value: Any) -> str:
    """A value as JSON, for an error: plain characters only, and few of them."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
