"""Stable Diffusion 1.5 checkpoints that hosts' own loaders accept: tiny U-Net, blank text encoder, a VAE."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1],
    "num_res_blocks": [1], "transformer_depth": [1], "transformer_depth_output": [0, 0],
    "transformer_depth_middle": -2, "use_spatial_transformer": True, "context_dim": 768, "num_heads": 8,
    "use_linear_in_transformer": False, "use_temporal_attention": False, "legacy": False,
}  # fmt: skip
WORDS = 64
"""Of the text encoder's embeddings so many differ: prompts differ, and most of the file is a hole."""


def write_sd15(path: Path, *, text_encoder: bool = True, for_webui: bool = False) -> None:
    """Write the checkpoint: random weights where a picture comes from, no layers in the text encoder, if it has one.

    The text encoder's size is fixed in ComfyUI, 246 MB; its zeros take no space on disk.

    Args:
        for_webui: whether the WebUI family must load it, too: it wants a middle block and the VAE in full, 168 MB.
    """
    parts = {
        "model.diffusion_model.": _unet(middle=for_webui),
        "first_stage_model.": _vae() if for_webui else _taesd(),
    }
    if text_encoder:
        parts["cond_stage_model.transformer."] = _text_encoder()
    torch.manual_seed(0)
    shapes = {
        prefix + name: weight.shape
        for prefix, part in parts.items()
        for name, weight in part.state_dict().items()
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        for name, shape in shapes.items():
            weight = _weight(name, shape)
            if weight is not None:
                file.seek(first + header[name]["data_offsets"][0])
                file.write(weight.half().numpy().tobytes())
        file.truncate(first + end)


def _weight(name: str, shape: torch.Size) -> torch.Tensor | None:
    """Random, of unit gain; a normalisation's are ones; None for zeros."""
    if name.endswith("final_layer_norm.bias"):
        return torch.full(shape, 0.1)  # the WebUI divides by a prompt's mean
    if name.startswith("cond_stage_model."):
        if "token_embedding" in name:
            return torch.randn(WORDS, shape[1]).repeat(-(-shape[0] // WORDS), 1)[: shape[0]]
        return torch.ones(shape) if "norm" in name and name.endswith("weight") else None
    if len(shape) > 1:
        return torch.randn(shape) * math.sqrt(2 / math.prod(shape[1:]))
    return torch.ones(shape) if name.endswith("weight") or name.endswith("vae_scale") else None


def _unet(*, middle: bool) -> nn.Module:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(**UNET | ({"transformer_depth_middle": 1} if middle else {}), device="meta")


def _vae() -> nn.Module:
    from comfy.ldm.models.autoencoder import AutoencoderKL

    sizes = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    with torch.device("meta"):
        return AutoencoderKL(ddconfig=sizes, embed_dim=4)


def _taesd() -> nn.Module:
    from comfy.taesd.taesd import TAESD

    return TAESD()


def _text_encoder() -> nn.Module:
    import comfy.clip_model
    import comfy.ops

    config = json.loads(files("comfy").joinpath("sd1_clip_config.json").read_text())
    return comfy.clip_model.CLIPTextModel(config, torch.float16, "meta", comfy.ops.disable_weight_init)
