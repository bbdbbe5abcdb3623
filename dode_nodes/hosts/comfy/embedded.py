"""The embedded models as ComfyUI's MODEL."""

from __future__ import annotations

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
from torch import nn

_TYPES = {"eps": comfy.model_base.ModelType.EPS, "flow": comfy.model_base.ModelType.FLOW}


class EmbeddedConfig(comfy.supported_models_base.BASE):
    """What ComfyUI asks of a model's family; each has its own class, whose name tells it apart."""

    unet_config = {"disable_unet_model_creation": True, "in_channels": 4}  # noqa: RUF012
    sampling_settings = {"shift": 1.0}  # noqa: RUF012
    memory_usage_factor = 0.1

    def __init__(self) -> None:
        super().__init__(self.unet_config)


def patcher_of(network: nn.Module, kind: str, config: EmbeddedConfig) -> comfy.model_patcher.ModelPatcher:
    """A network of this kind, "eps" or "flow", as a loader node would return it.

    Args:
        network: is called with x, timesteps and ``context``, and knows its ``dtype``.
    """
    model = comfy.model_base.BaseModel(config, model_type=_TYPES[kind])
    model.diffusion_model = network
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
