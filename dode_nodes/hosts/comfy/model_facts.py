"""What a table stores about its model, and whether another model matches it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...tables import old_fingerprint
from ...tables.families import family_of
from ...tables.fingerprint import fingerprint, same_checkpoint
from ...tables.gate import SAMPLE_LENGTH, Facts
from ...tables.model_check import check_facts, same_range
from .attached import attached_names
from .weights import as_in_any_format, network_weights

_CACHES = {
    "easycache": "EasyCache",
    "lazycache": "LazyCache",
    "teacache": "TeaCache",
    "kv_attn_input": "Flux KV Cache",
}
"""What remembers earlier steps: by the names that nodes give it, and as people know it."""


def model_facts(model: ModelPatcher) -> dict[str, Any]:
    """Family, prediction type, channels, shift, σ range, fingerprint and attached patches."""
    sampling = model.get_model_object("model_sampling")
    shift = getattr(sampling, "shift", None)
    return {
        "family": family_of(type(model.model.model_config).__name__),
        "prediction_type": prediction_type(sampling),
        "channels": int(model.get_model_object("latent_format").latent_channels),
        "shift": float(shift) if shift is not None else None,
        "sigma_min": float(sampling.sigma_min),
        "sigma_max": float(sampling.sigma_max),
        "fingerprint": fingerprint(as_in_any_format(network_weights(model))),
        "patches": _patches(model),
    }


def prediction_type(sampling: torch.nn.Module) -> str:
    """Of the sampling object in effect: nodes such as ModelSamplingDiscrete replace the checkpoint's."""
    kinds = {"CONST": "flow", "EDM": "edm", "V_PREDICTION": "v", "X0": "x0", "EPS": "eps"}  # EPS last: a base
    for name, kind in kinds.items():
        if isinstance(sampling, getattr(comfy.model_sampling, name)):
            return kind
    return type(sampling).__mro__[-2].__name__


def is_flow(model: ModelPatcher) -> bool:
    """Whether noise and data are interpolated, so that σ itself measures steps."""
    return prediction_type(model.get_model_object("model_sampling")) == "flow"


def computing_dtype(model: ModelPatcher) -> torch.dtype:
    """What the network computes in: weights in fp8 are cast first."""
    cast: torch.dtype | None = getattr(model.model, "manual_cast_dtype", None)
    return cast or model.model_dtype() or torch.float32


def check_no_cache(model: ModelPatcher) -> None:
    """Refuse a model with a cache of earlier steps that is known by name.

    Raises:
        DodeError: there is one.
    """
    found = [_CACHES[name.lower()] for name in attached_names(model) if name.lower() in _CACHES]
    if found:
        raise DodeError(
            f"remove {' and '.join(found)} from the model to distil or compare: it reuses results of earlier "
            "steps, so nothing can be fitted or measured. You can put it back when you sample with the table"
        )


def check_teacher(teacher: ModelPatcher, model: ModelPatcher) -> None:
    """That a model can follow another one: both go from one noise to latents of one kind.

    Raises:
        DodeError: they do not.
    """
    check_no_cache(teacher)
    theirs, mine = (each.get_model_object("model_sampling") for each in (teacher, model))
    kinds = prediction_type(theirs), prediction_type(mine)
    if kinds[0] != kinds[1]:
        raise DodeError(
            f"connect a teacher_model that predicts what the model does: it predicts '{kinds[0]}', the model "
            f"'{kinds[1]}'"
        )
    formats = [type(each.get_model_object("latent_format")).__name__ for each in (teacher, model)]
    if formats[0] != formats[1]:
        raise DodeError(
            f"connect a teacher_model of the model's kind: its latents are {formats[0]}, the model's {formats[1]}"
        )
    ends = [{end: float(getattr(each, end)) for end in ("sigma_min", "sigma_max")} for each in (theirs, mine)]
    if not same_range(*ends):
        raise DodeError(
            "give teacher_model the σ of the model, by the same shift and the same ModelSampling node: its σ go from "
            f"{ends[0]['sigma_max']:g} to {ends[0]['sigma_min']:g}, the model's from {ends[1]['sigma_max']:g} to "
            f"{ends[1]['sigma_min']:g}"
        )


def _patches(model: ModelPatcher) -> dict[str, Any]:
    """How many weights have LoRAs or other patches, how strong they are, and what they are known by."""
    strengths = sorted({float(patch[0]) for patches in model.patches.values() for patch in patches})
    facts = {"weights": len(model.patches), "strengths": strengths}
    return facts | ({"content": _content(model.patches)} if model.patches else {})


def _content(patches: Mapping[str, Sequence[tuple[Any, ...]]]) -> str:
    """A hash of some numbers of every patch, whatever its kind; strengths and the order of loading play no part."""
    content = hashlib.sha256()
    for name in sorted(patches):
        content.update(name.encode())
        for one in sorted(b"".join(_some_numbers(patch)) for _, patch, *_ in patches[name]):
            content.update(one)
    return content.hexdigest()


def _some_numbers(patch: Any) -> Iterator[bytes]:
    """Of the tensors in a patch: an adapter's weights, or what lies in tuples."""
    if isinstance(patch, torch.Tensor):
        yield patch.detach().flatten()[:SAMPLE_LENGTH].float().cpu().numpy().tobytes()
    elif isinstance(patch, (tuple, list)):
        for each in patch:
            yield from _some_numbers(each)
    elif hasattr(patch, "weights"):
        yield from _some_numbers(patch.weights)


def check_model(theirs: Facts, model: ModelPatcher) -> list[str]:
    """Whether a table with these facts is for this model.

    Returns:
        Remarks, one line each: another model of the family, other patches, another shift, another range of σ.

    Raises:
        DodeError: another family, prediction type or number of channels.
    """
    mine = model_facts(model)
    return check_facts(theirs, mine, is_same(theirs.get("fingerprint", {}), model, mine))


def is_same(fingerprint: Facts, model: ModelPatcher, mine: Facts) -> bool | None:
    """Whether a table's fingerprint is this model's; None where that cannot be told."""
    if old_fingerprint.is_old(fingerprint):
        return old_fingerprint.is_of(fingerprint, network_weights(model))
    return same_checkpoint(fingerprint, mine["fingerprint"])


def pixels_per_side(model: ModelPatcher) -> int | None:
    """Of a picture, for each number along a side of its latent; None where this ComfyUI does not say.

    Older ones do not; there latents of two dimensions and 4 or 16 channels stand for 8 × 8 pixels a number, but for
    Stable Cascade's.
    """
    latent = model.model.latent_format
    usual = latent.latent_dimensions == 2 and latent.latent_channels in (4, 16)
    cascade = type(latent).__name__.startswith("SC_")
    return getattr(latent, "spacial_downscale_ratio", 8 if usual and not cascade else None)
