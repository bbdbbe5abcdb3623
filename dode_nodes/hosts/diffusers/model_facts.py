"""What a table stores about its model, and whether another pipeline has that model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from ...tables.families import family_of
from ...tables.fingerprint import fingerprint, same_checkpoint
from ...tables.model_check import check_facts
from ...tables.table import LambdaTable
from .host_schedule import HostSchedule, without_table

_LORA = ("lora_", "modules_to_save")


def network_of(pipe: DiffusionPipeline) -> torch.nn.Module:
    """The network that is evaluated at every step; of two, the first."""
    unet: torch.nn.Module | None = getattr(pipe, "unet", None)
    return pipe.transformer if unet is None else unet


def model_facts(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Family, prediction type, channels, shift, σ range, fingerprint and LoRAs; without what cannot be told."""
    network, host = network_of(pipe), HostSchedule(without_table(pipe.scheduler.config))
    of_plain = host.plain.config
    facts: dict[str, Any] = {
        "family": _family(network),
        "prediction_type": host.prediction,
        "channels": _channels(pipe, network),
        "fingerprint": fingerprint(_own_weights(network)),
        "patches": _patches(network),
    }
    if host.flow and not of_plain.use_dynamic_shifting:
        facts["shift"] = float(of_plain.shift)
    if not host.flow:
        sigmas = host.trained_sigmas
        facts |= {"sigma_min": float(sigmas[0]), "sigma_max": float(sigmas[-1])}
    return {name: value for name, value in facts.items() if value is not None}


def check_pipeline(table: LambdaTable, pipe: DiffusionPipeline) -> list[str]:
    """Whether a table is for this pipeline's model, wherever it was made.

    Returns:
        Remarks, one line each: another model of the family, other LoRAs, another shift, another range of σ.

    Raises:
        DodeError: another family, prediction type or number of channels.
    """
    mine = model_facts(pipe)
    same = same_checkpoint(table.model.get("fingerprint", {}), mine["fingerprint"])
    return check_facts(table.model, mine, same)


def _family(network: torch.nn.Module) -> str | None:
    plain = getattr(network, "_orig_mod", network)
    if not isinstance(plain, UNet2DConditionModel):
        return family_of(type(plain).__name__)
    config = plain.config
    if config.addition_embed_type == "text_time":
        return {2048: "sdxl", 1280: "sdxl-refiner"}.get(config.cross_attention_dim)
    return {768: "sd15", 1024: "sd2"}.get(config.cross_attention_dim)


def _channels(pipe: DiffusionPipeline, network: Any) -> int | None:
    """Of a latent. The network's own may be packed: the VAE's count, if there is one."""
    vae = getattr(pipe, "vae", None)
    config = {} if vae is None else vae.config
    channels: int | None = (
        config.get("latent_channels") or config.get("z_dim") or network.config.get("out_channels")
    )
    return channels


def _own_weights(network: torch.nn.Module) -> list[torch.Tensor]:
    """As the files have them: without what a LoRA adds beside them."""
    return [
        _at_hand(network, name, weight)
        for name, weight in network.state_dict().items()
        if not any(part in name for part in _LORA)
    ]


def _at_hand(network: torch.nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight's values, where accelerate has taken them away until they are needed."""
    owner, _, own_name = name.rpartition(".")
    if not weight.is_meta:
        return weight
    away = getattr(getattr(network.get_submodule(owner), "_hf_hook", None), "weights_map", None)
    return weight if away is None else away[own_name]


def _patches(network: torch.nn.Module) -> dict[str, Any]:
    """PEFT's LoRAs: how many weights have one that is on, and how strong they are."""
    layers: list[Any] = [layer for layer in network.modules() if hasattr(layer, "active_adapters")]
    strengths = [
        sum(layer.scaling[name] for name in layer.active_adapters if name in layer.scaling)
        for layer in layers
        if hasattr(layer, "scaling") and not layer.disable_adapters
    ]
    on = [float(strength) for strength in strengths if strength]
    return {"weights": len(on), "strengths": sorted(set(on))}
