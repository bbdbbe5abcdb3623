"""Latents of several streams, such as pictures with their sound: one tensor while we compute, as in a sampler's run."""

from __future__ import annotations

from typing import Any

import comfy.utils
import torch

from ...errors import DodeError


def is_nested(samples: Any) -> bool:
    """Whether a latent has several streams."""
    return bool(getattr(samples, "is_nested", False))


def packed(samples: Any) -> torch.Tensor:
    """A latent as one tensor: ``[B, 1, numbers]`` of several streams, itself of one.

    Raises:
        DodeError: this ComfyUI knows no such latents.
    """
    if not is_nested(samples):
        return samples
    if not hasattr(comfy.utils, "pack_latents"):
        raise DodeError("update ComfyUI: this one cannot sample pictures and sound together")
    tensor: torch.Tensor = comfy.utils.pack_latents(samples.unbind())[0]
    return tensor


def unpacked(x: torch.Tensor, like: Any) -> Any:
    """The streams of a packed tensor, of the shapes that a latent of any batch size has."""
    if not is_nested(like):
        return x
    return type(like)(comfy.utils.unpack_latents(x, [stream.shape for stream in like.unbind()]))


def pictures_of(samples: Any) -> torch.Tensor:
    """The stream that is shown: the first, as in ComfyUI's 'VAE Decode'."""
    return samples.unbind()[0] if is_nested(samples) else samples
