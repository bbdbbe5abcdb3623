"""ComfyUI's own networks, tiny and with random weights, to look at; and their weights as diffusers keeps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "context_dim": 24, "num_heads": 2, "use_spatial_transformer": True,
    "use_linear_in_transformer": False, "legacy": False, "dtype": torch.float32,
}  # fmt: skip
SMALL_UNET = UNET | {
    "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1], "transformer_depth_output": [1, 0],
}  # fmt: skip
"""One resolution, for what evaluates it hundreds of times."""
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 24, "context_in_dim": 32,
    "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 4, "depth": 2, "depth_single_blocks": 3, "axes_dim": [4, 6, 6],
    "theta": 10000, "qkv_bias": True, "guidance_embed": True, "dtype": torch.float32,
}  # fmt: skip
MMDIT = {
    "in_channels": 16, "patch_size": 2, "depth": 2, "pos_embed_max_size": 16, "pos_embed_scaling_factor": None,
    "num_patches": 256, "adm_in_channels": 48, "qk_norm": "rms",
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 40, "out_features": 128}},
    "dtype": torch.float32,
}  # fmt: skip


def real(config: type, settings: dict[str, Any], seed: int = 0, weights: torch.dtype = torch.float32) -> Any:
    """A model of one of ComfyUI's families, in a ModelPatcher; it computes in single precision.

    Args:
        weights: what they are kept in.
    """
    import comfy.model_patcher

    with torch.inference_mode(False):
        made = config(dict(settings))
        if weights != torch.float32:
            made.set_inference_dtype(weights, torch.float32)
        model = made.get_model({}, device=torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)
        for weight in [*model.parameters(), *model.diffusion_model.buffers()]:  # they come uninitialised
            weight.data = (torch.randn(weight.shape, generator=generator) * 0.05).to(weights)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def lora_of(model: Any) -> dict[str, Tensor]:
    """A LoRA for a U-Net's model, of the same numbers in every layer that it has: it makes other pictures."""
    state = {}
    for name, weight in model.model.state_dict().items():
        if name.endswith("proj_in.weight"):
            key = name.replace("diffusion_model.", "lora_unet_").removesuffix(".weight").replace(".", "_")
            state |= {f"{key}.lora_up.weight": torch.full((len(weight), 1), 0.2),
                      f"{key}.lora_down.weight": torch.full((1, weight[0].numel()), 0.2)}  # fmt: skip
    return state


def in_diffusers_layout(weights: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """By the maps that ComfyUI reads diffusers' files with, backwards."""
    import comfy.utils

    makers = {
        "hidden_size": "flux_to_diffusers",
        "depth": "mmdit_to_diffusers",
        "channel_mult": "unet_to_diffusers",
    }
    name = next(maker for key, maker in makers.items() if key in settings)
    layout = {}
    for theirs, ours in getattr(comfy.utils, name)(settings).items():
        key, part, convert = ours if isinstance(ours, tuple) and len(ours) == 3 else (*_pair(ours), None)
        if key in weights:
            weight = weights[key] if part is None else weights[key].narrow(*part)
            layout[theirs] = weight.clone() if convert is None else convert(weight)
    return layout


def _pair(ours: str | tuple[Any, ...]) -> tuple[Any, ...]:
    return (ours, None) if isinstance(ours, str) else ours
