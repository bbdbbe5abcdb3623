"""The weights of a model's network as its file has them, whatever has been put on it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from comfy.model_patcher import ModelPatcher
from torch import Tensor

_NETWORK = "diffusion_model."
_COMPILED = "_orig_mod."
_SCALES = (".scale_weight", ".weight_scale")
"""What a layer in scaled fp8 has beside its weight: this ComfyUI's name for it, and a newer one's."""


def network_weights(model: ModelPatcher) -> dict[str, Tensor]:
    """By name; nothing where they cannot be had. Where a patch (LoRA) is applied, what is beneath it."""
    try:
        state = model.model_state_dict(filter_prefix=_NETWORK)
    except Exception as error:  # whatever another pack's model makes of it
        logging.warning("D-ODE: the weights of this model cannot be read: %s", error)
        return {}
    named = {name.replace(_COMPILED, ""): weight for name, weight in state.items()}
    return {
        name: model.backup[name].weight if name in model.backup else weight for name, weight in named.items()
    }


def as_in_any_format(weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Those that only rounding tells from the same weights in another number format: scaled ones are left out."""
    scaled = {f"{name.removesuffix(end)}.weight" for name in weights for end in _SCALES if name.endswith(end)}
    return [weight for name, weight in weights.items() if name not in scaled]
