"""What makes two requests for a fit the same: the model and all that is put on it, prompts and settings, by content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...fit.key import NoKey, key_of
from .combinations import Combinations
from .guiders import Guider
from .job import Request
from .lora_job import LoraRequest
from .model_facts import computing_dtype, model_facts
from .streams import is_nested

_PUT_ON = (
    "patches", "object_patches", "weight_wrapper_patches", "wrappers", "callbacks", "injections", "attachments",
    "additional_models", "hook_patches", "model_options",
)  # fmt: skip
"""Where a patcher keeps what nodes have put on it."""
_OF_A_RUN = ("model_patcher", "model_options", "conds", "inner_model", "loaded_models", "original_conds")
"""What of a guider is the model's, or is made anew for each run."""
_IN_WORDS = {"HookGroup": "hooks", "ControlNet": "a ControlNet"}
_HOSTS = ("comfy.", "comfy_extras.")
"""Modules of ComfyUI's own."""


def key_of_request(request: Request) -> str:
    """See ``fit.key``. How many latents are evaluated at a time does not count: it changes nothing that is found.

    Raises:
        NoKey: something in it cannot be compared, as functions and ControlNets cannot; says what.
    """
    parts = {
        "count": request.count,
        "schedules": request.schedules,
        "recipe": request.recipe.parts,
    }
    return key_of(_of_combinations(request) | parts, _known)


def key_of_training(request: LoraRequest) -> str:
    """The same for the training of a LoRA."""
    parts = {
        "count": request.count,
        "rows": [[row.sha256, row.to_json()] for row in request.rows],
        "training": vars(request.recipe),
        "rank": request.rank,
    }
    return key_of(_of_combinations(request) | parts, _known)


def _of_combinations(request: Combinations) -> dict[str, Any]:
    return {
        "model": _of_model(request.model),
        **({"teacher": _of_teacher(request)} if request.teachers else {}),
        "guiders": [_of_guider(guider) for guider in request.guiders],
        "latents": [_shapes(latent) for latent in (request.latent, *request.further)],
        "seed": request.seed,
    }


def _of_teacher(request: Combinations) -> list[Any]:
    """Of a model of the teacher's own, and how it is guided."""
    return [_of_model(request.models[-1]), [_of_guider(guider) for guider in request.teachers]]


def _of_model(model: ModelPatcher) -> dict[str, Any]:
    facts = model_facts(model)
    if not facts["fingerprint"]:
        raise NoKey("weights that cannot be read")
    return {
        "facts": facts,
        "dtype": computing_dtype(model),
        "sampling": model.get_model_object("model_sampling"),
        "put on": {name: getattr(model, name, None) for name in _PUT_ON},
    }


def _of_guider(guider: Guider) -> dict[str, Any]:
    if not _is_hosts_own(type(guider)):
        raise NoKey(type(guider).__name__)
    return {
        "kind": type(guider).__name__,
        "options": guider.model_options,
        "prompts": {
            name: [_without_number(cond) for cond in conds or []]
            for name, conds in guider.original_conds.items()
        },
        "scales": {name: value for name, value in vars(guider).items() if name not in _OF_A_RUN},
    }


def _without_number(cond: Mapping[str, Any]) -> dict[str, Any]:
    """ComfyUI gives a conditioning a number anew whenever a guider takes it."""
    return {name: value for name, value in cond.items() if name != "uuid"}


def _shapes(latent: Any) -> list[list[int]]:
    """Of one latent's streams: how many there are in a batch does not count."""
    return [list(stream.shape[1:]) for stream in (latent.unbind() if is_nested(latent) else [latent])]


def _known(value: Any) -> Any:
    """ComfyUI's own things whose content is all that there is to them: LoRAs, σ, and functions without any state."""
    kind = type(value)
    if kind.__module__.startswith("comfy.weight_adapter.") and hasattr(value, "weights"):
        return [kind.__name__, value.weights]
    if isinstance(value, torch.nn.Module) and _is_hosts_own(kind) and not list(value.children()):
        return dict(_content(value))
    code = getattr(value, "__code__", None)
    if code is not None and _is_hosts_own(value) and not value.__closure__ and not value.__defaults__:
        return [value.__module__, value.__qualname__, code.co_firstlineno]
    name = getattr(value, "__qualname__", kind.__name__).partition(".")[0]
    raise NoKey(_IN_WORDS.get(name, name))


def _content(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Of an object that says what σ are, or how a model predicts: its numbers, and the classes that it is made of."""
    yield "kind", [each.__qualname__ for each in type(module).__mro__]
    yield from module.named_buffers()
    yield from module.named_parameters()
    yield from ((name, value) for name, value in vars(module).items() if not name.startswith("_"))


def _is_hosts_own(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith(_HOSTS)
