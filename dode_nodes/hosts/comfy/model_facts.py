"""What a table stores about its model, and whether another model matches it."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...tables import old_fingerprint
from ...tables.families import family_of
from ...tables.fingerprint import fingerprint, same_checkpoint
from ...tables.gate import Facts
from .attached import attached_names
from .weights import as_in_any_format, network_weights

_CACHES = {
    "easycache": "EasyCache",
    "lazycache": "LazyCache",
    "teacache": "TeaCache",
    "kv_attn_input": "Flux KV Cache",
}
"""What remembers earlier steps: by the names that nodes give it, and as people know it."""
_SIGMA_RTOL = 0.01


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


def _patches(model: ModelPatcher) -> dict[str, Any]:
    strengths = sorted({float(patch[0]) for patches in model.patches.values() for patch in patches})
    return {"weights": len(model.patches), "strengths": strengths}


def check_model(theirs: Facts, model: ModelPatcher) -> list[str]:
    """Whether a table with these facts is for this model.

    Returns:
        Remarks, one line each: another model of the family, other patches, another shift, another range of σ.

    Raises:
        DodeError: another family, prediction type or number of channels.
    """
    mine = model_facts(model)
    if "family" in theirs:
        theirs = dict(theirs) | {"family": family_of(theirs["family"])}
    for key, words in (
        ("family", "family"),
        ("prediction_type", "prediction type"),
        ("channels", "number of channels"),
    ):
        if theirs.get(key) not in (None, mine[key]):
            raise DodeError(
                f"this λ table was made for another kind of model: its {words} is '{theirs[key]}', "
                f"this model's is '{mine[key]}'. Distil a table for this model"
            )
    remarks = []
    same = _is_same(theirs.get("fingerprint", {}), model, mine)
    if same is False:
        remarks.append(
            "the λ table was made for another checkpoint of this family; distil a table for this model"
        )
    elif same is None and theirs.get("fingerprint"):
        remarks.append("could not check whether the λ table was made for this checkpoint")
    elif theirs.get("patches") not in (None, mine["patches"]):
        remarks.append("the λ table was made with different LoRAs or patches on this model")
    if theirs.get("shift") is not None and theirs["shift"] != mine["shift"]:
        remarks.append(f"the λ table was made at shift {theirs['shift']:g}, this model has {mine['shift']:g}")
    elif not _same_range(theirs, mine):
        remarks.append(
            f"the λ table was made for σ from {theirs['sigma_max']:g} to {theirs['sigma_min']:g}, this model's "
            f"go from {mine['sigma_max']:g} to {mine['sigma_min']:g}"
        )
    return remarks


def _is_same(fingerprint: Facts, model: ModelPatcher, mine: Facts) -> bool | None:
    if old_fingerprint.is_old(fingerprint):
        return old_fingerprint.is_of(fingerprint, network_weights(model))
    return same_checkpoint(fingerprint, mine["fingerprint"])


def _same_range(theirs: Facts, mine: Facts) -> bool:
    """Hosts compute the ends in ways of their own. Where the terminal SNR is 0, σ begins at hundreds of times more."""
    ends = [(theirs.get(end), mine[end]) for end in ("sigma_min", "sigma_max")]
    return any(end is None for end, _ in ends) or all(abs(a - b) <= _SIGMA_RTOL * b for a, b in ends)
