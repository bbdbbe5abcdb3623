"""Tells fits apart: two with the same key find the same rows, so the second need not be made.

A key is a SHA-256 of everything that a fit depends on: the version of the fit, numbers, words and tensors by content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

FIT_VERSION = 5
"""Raise it with every change of what a fit computes: what was fitted before is then fitted again. It has nothing to do
with the package's version."""


class NoKey(Exception):
    """There is something in a fit that cannot be compared with what there was in another; says what."""


Known = Callable[[Any], Any]
"""What a host knows of a thing of its own: in its place, what a key can be made of. Raises ``NoKey``."""


def refuse(value: Any) -> Any:
    """Of things that nothing is known of."""
    raise NoKey(type(value).__name__)


@dataclass(frozen=True)
class Identity:
    """What a fit is known by.

    Attributes:
        key: see ``key_of``; "" where there is none.
        unlike: what in the fit cannot be compared, so that there is none.
    """

    key: str = ""
    unlike: str = ""

    @classmethod
    def of(cls, key: Callable[[], str]) -> Identity:
        """By a key, unless what makes it raises ``NoKey``."""
        try:
            return cls(key())
        except NoKey as what:
            return cls(unlike=str(what))

    @property
    def remarks(self) -> list[str]:
        """What the user should know, one line each."""
        if not self.unlike:
            return []
        return [
            f"this fit will not be recognised another time, because of {self.unlike}: it is made anew each time"
        ]


def key_of(parts: Mapping[str, Any], known: Known = refuse) -> str:
    """The key of a fit, in hexadecimal. The order of a mapping's entries does not count.

    Args:
        parts: all that the fit depends on: nested mappings, sequences and sets of numbers, words and tensors.
        known: see ``Known``.

    Raises:
        NoKey: there is something else in it.
    """
    try:
        text = json.dumps(["fit", FIT_VERSION, _canonical(parts, known)])
    except RecursionError:
        raise NoKey("what holds itself") from None
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any, known: Known) -> Any:
    """The value as JSON, with its type wherever JSON does not tell."""
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, (list, tuple)):
        return [_canonical(each, known) for each in value]
    if isinstance(value, Mapping):
        pairs = [[_canonical(each, known) for each in pair] for pair in value.items()]
        return {"mapping": sorted(pairs, key=json.dumps)}
    if isinstance(value, Set):
        return {"set": sorted((_canonical(each, known) for each in value), key=json.dumps)}
    if isinstance(value, Enum):
        return {"enum": [type(value).__name__, value.name]}
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value)}
    if isinstance(value, Tensor):
        return {"tensor": _of_tensor(value)}
    return _canonical(known(value), known)


def _of_tensor(x: Tensor) -> list[Any]:
    """Type, shape and hash of the numbers, wherever they are."""
    if (
        type(x) not in (Tensor, torch.nn.Parameter)
        or x.is_meta
        or x.layout != torch.strided
        or x.is_quantized
    ):
        raise NoKey(f"a tensor of type {type(x).__name__}")
    numbers = x.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    return [str(x.dtype), list(x.shape), hashlib.sha256(numbers.data).hexdigest()]
