"""LoRAs as files: kohya's names and metadata, which every loader reads; and what a LoRA is known by, whoever saved it."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ..errors import TableError
from . import publish

_PREFIX = "lora_unet_"
_OTHER_PREFIXES = re.compile(r"^(lora_unet_|lycoris_|diffusion_model\.|unet\.|transformer\.)")
_PART = re.compile(r"\.(?:(lora_up|lora_B)|(lora_down|lora_A))\.weight$|\.(alpha)$")


class Factors(NamedTuple):
    """A low-rank change of one weight, alpha / rank · up·down.

    Attributes:
        up: ``[out, rank]``, or with ones behind.
        down: ``[rank, in]``, or with a kernel behind.
        alpha: rank for a scale of 1.
    """

    up: Tensor
    down: Tensor
    alpha: float


def write_lora(path: Path, factors: Mapping[str, Factors]) -> Path:
    """Save a LoRA as float16, whole or not at all.

    Args:
        path: which must not exist yet.
        factors: by the names of their layers in the network, with dots.

    Raises:
        NameTaken: the file exists.
        TableError: it cannot be written, or a number is too large for float16.
    """
    ranks = [len(each.down) for each in factors.values()]
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": f"{max(each.alpha for each in factors.values()):g}",
    }
    publish.publish(path, safetensors.torch.save(kohya_state(factors), metadata), overwrite=False)
    return path


def kohya_state(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of such a file, float16 on the CPU.

    Raises:
        TableError: a number is too large for float16, or not finite.
    """
    state = {}
    for name, (up, down, alpha) in factors.items():
        key = _PREFIX + name.replace(".", "_")
        state[f"{key}.lora_up.weight"] = _half(up)
        state[f"{key}.lora_down.weight"] = _half(down)
        state[f"{key}.alpha"] = _half(torch.tensor(alpha))
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise TableError(
            "this LoRA has numbers that are not finite, or too large for float16: it is of no use"
        )
    return state


def factors_of(state: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The changes in a file's tensors, with kohya's, ComfyUI's or diffusers' names; others are passed over."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in state.items():
        if (found := _PART.search(key)) is not None:
            up, down, _ = found.groups()
            parts[key[: found.start()]]["up" if up else "down" if down else "alpha"] = value
    return {
        name: Factors(part["up"], part["down"], float(part.get("alpha", torch.tensor(len(part["down"])))))
        for name, part in parts.items()
        if {"up", "down"} <= part.keys()
    }


def content_hash(factors: Mapping[str, Factors]) -> str:
    """What a LoRA is known by: SHA-256 of its numbers, as float16, and of the names of the weights that it changes.

    It outlives loading and saving in another program: prefixes, dots and the file's order play no part, and an alpha
    that is not written down is the rank. In hexadecimal.
    """
    content = hashlib.sha256()
    for name, (up, down, alpha) in sorted((_plain(name), each) for name, each in factors.items()):
        content.update(f"{name} {len(up)} {len(down)} {alpha / len(down):.4g}\n".encode())
        for tensor in (up, down):
            content.update(_half(tensor).flatten(1).numpy().astype("<f2").tobytes())
    return content.hexdigest()


def _plain(name: str) -> str:
    """The name of a weight without what programs add to it."""
    name = _OTHER_PREFIXES.sub("", name).removesuffix(".weight")
    return name.replace(".", "_")


def _half(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float16).contiguous()
