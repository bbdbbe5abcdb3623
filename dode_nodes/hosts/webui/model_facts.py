"""What a table stores about its model, and what is known of the checkpoint that the host has loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...sampling.schedules import NoiseSchedule
from ...tables.families import family_of
from ...tables.fingerprint import fingerprint, same_checkpoint
from ...tables.gate import Facts
from ...tables.model_check import check_facts
from ...tables.table import LambdaTable

_KINDS = {"epsilon": "eps", "eps": "eps", "v_prediction": "v", "v": "v", "const": "flow", "edm": "edm"}
_CLASSES = {"CONST": "flow", "EDM": "edm", "V_PREDICTION": "v", "EPS": "eps"}
"""Of reForge's sampling objects; EPS last, for it is a base."""
_FLAGS = {"is_ssd": "ssd-1b", "is_sdxl": "sdxl", "is_sd3": "sd3", "is_sd2": "sd2", "is_sd1": "sd15"}
"""Of AUTOMATIC1111's models, more particular ones first."""

_fingerprints: WeakKeyDictionary[torch.nn.Module, tuple[str, dict[str, Any]]] = WeakKeyDictionary()
"""With the file that the weights came from: AUTOMATIC1111 loads another one into the same network."""


def model_facts(model: Any) -> dict[str, Any]:
    """Family, prediction type, channels, shift, σ range, fingerprint; without what cannot be told."""
    sampling, sigmas = sampling_of(model), trained_sigmas(model)
    facts = {
        "family": _family(model),
        "prediction_type": prediction_type(model),
        "channels": _channels(model),
        "shift": _number(getattr(sampling, "mu", None) or getattr(sampling, "shift", None)),
        "sigma_min": float(sigmas[0]),
        "sigma_max": float(sigmas[-1]),
        "fingerprint": _fingerprint(model),
    }
    return {name: value for name, value in facts.items() if value is not None}


def patches_of(model: Any) -> dict[str, Any]:
    """The LoRAs that are on now: how many weights have one, and how strong they are."""
    unet = _unet(model)
    if unet is None:
        names = [getattr(each, "network_current_names", ()) for each in network_of(model).modules()]
        return _patches(sum(map(bool, names)), {float(one[2]) for each in names for one in each})
    own = getattr(unet, "lora_patches", None)
    if own is None:
        lists = unet.patches
        return _patches(len(lists), {float(one[0]) for each in lists.values() for one in each})
    weights = {name for patches in own.values() for name in patches}
    return _patches(len(weights), {float(key[1]) for key, patches in own.items() if patches})


def check_model(table: LambdaTable, model: Any) -> list[str]:
    """Whether a table is for this model.

    Returns:
        Remarks, one line each: another model of the family, other LoRAs, another shift, another range of σ.

    Raises:
        DodeError: another family, prediction type or number of channels.
    """
    mine = model_facts(model) | {"patches": patches_of(model)}
    return check_facts(table.model, mine, is_same(table.model.get("fingerprint", {}), mine))


def is_same(theirs: Facts, mine: Facts) -> bool | None:
    """Whether a table's fingerprint is this model's; None where that cannot be told."""
    return same_checkpoint(theirs, mine["fingerprint"])


def network_of(model: Any) -> torch.nn.Module:
    """The network that is evaluated at every step."""
    unet = _unet(model)
    network: torch.nn.Module = (model if unet is None else unet).model.diffusion_model
    return network


def sampling_of(model: Any) -> Any:
    """What knows σ and t: Forge's predictor, reForge's sampling object; None in AUTOMATIC1111."""
    unet = _unet(model)
    inner = None if unet is None else unet.model
    return getattr(inner, "predictor", None) or getattr(inner, "model_sampling", None)


def trained_sigmas(model: Any) -> torch.Tensor:
    """Ascending, on the CPU, float32."""
    sampling = sampling_of(model)
    if sampling is not None:
        sigmas: torch.Tensor = sampling.sigmas
    else:
        kept = model.alphas_cumprod.double()
        sigmas = ((1 - kept) / kept).sqrt()
    return sigmas.detach().float().cpu()


def prediction_type(model: Any) -> str | None:
    """As tables name it; None for a kind that is not known."""
    sampling = sampling_of(model)
    kind = getattr(sampling, "prediction_type", None) or getattr(model, "parameterization", None)
    if kind is not None:
        return _KINDS.get(kind)
    names = {base.__name__ for base in type(sampling).__mro__}
    return next((kind for name, kind in _CLASSES.items() if name in names), None)


def is_flow(model: Any) -> bool:
    """Whether noise and data are interpolated, so that σ itself measures steps."""
    return prediction_type(model) == "flow"


def noise_schedule(model: Any) -> NoiseSchedule:
    """The σ that schedules are made of."""
    if not is_flow(model):
        return NoiseSchedule.discrete(trained_sigmas(model))
    sampling = sampling_of(model)
    mu = getattr(sampling, "mu", None)
    return NoiseSchedule.rectified_flow(float(sampling.shift) if mu is None else math.exp(mu))


def computing_dtype(model: Any) -> torch.dtype:
    """What the network computes in."""
    own: torch.dtype | None = getattr(getattr(_unet(model), "model", None), "computation_dtype", None)
    return own or next(network_of(model).parameters()).dtype


def _unet(model: Any) -> Any:
    """Forge's and reForge's patcher; None in AUTOMATIC1111."""
    objects = getattr(model, "forge_objects", None)
    return None if objects is None else objects.unet


def _family(model: Any) -> str | None:
    unet = _unet(model)
    config = getattr(model, "model_config", None) or getattr(
        getattr(unet, "model", None), "model_config", None
    )
    if config is not None:
        return family_of(type(config).__name__)
    return next((family for flag, family in _FLAGS.items() if getattr(model, flag, False)), None)


def _channels(model: Any) -> int | None:
    objects = getattr(model, "forge_objects", None)
    channels = getattr(getattr(objects, "vae", None), "latent_channels", None)
    return channels or getattr(model, "latent_channels", None) or getattr(model, "channels", None)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _patches(weights: int, strengths: set[float]) -> dict[str, Any]:
    return {"weights": weights, "strengths": sorted(strengths)}


def _fingerprint(model: Any) -> dict[str, Any]:
    """Of the weights as the file has them."""
    network, file = network_of(model), str(model.sd_checkpoint_info.filename)
    known_of, known = _fingerprints.get(network, ("", {}))
    if known_of != file:
        known = fingerprint(_own_weights(model, network))
        _fingerprints[network] = file, known
    return known


def _own_weights(model: Any, network: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Without LoRAs: every host keeps the weights that it has merged them into."""
    kept: dict[str, torch.Tensor] = {}
    unet = _unet(model)
    for holder in (unet, getattr(unet, "lora_loader", None)):
        kept |= {
            name.removeprefix("diffusion_model."): w for name, w in getattr(holder, "backup", {}).items()
        }
    for name, module in network.named_modules():
        backup = getattr(module, "network_weights_backup", None)
        if isinstance(backup, torch.Tensor):
            kept[f"{name}.weight"] = backup
    for name, weight in network.state_dict().items():
        yield kept.get(name, weight)
