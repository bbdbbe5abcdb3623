"""What other nodes have put on a model, by name: for errors that say what to remove."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from comfy.model_patcher import ModelPatcher


def attached_names(model: ModelPatcher) -> list[str]:
    """Wrappers by the names that their nodes gave them; functions and patches by the class that they are from."""
    options = dict(model.model_options)
    options["transformer_options"] = dict(options.get("transformer_options", {}))
    wrapped = [model.wrappers, options["transformer_options"].pop("wrappers", {})]
    named = [
        str(key)
        for kinds in wrapped
        for by_key in kinds.values()
        for key, wrappers in by_key.items()
        if key and wrappers
    ]
    return list(dict.fromkeys([*named, *_homes(options)]))


def _homes(options: Any) -> Iterator[str]:
    if isinstance(options, dict):
        options = list(options.values())
    if isinstance(options, (list, tuple)):
        for each in options:
            yield from _homes(each)
    elif callable(options):
        function = getattr(options, "func", options)  # of a partial
        yield str(getattr(function, "__qualname__", type(function).__qualname__)).partition(".")[0]
