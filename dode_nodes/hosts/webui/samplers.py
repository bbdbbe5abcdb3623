"""D-ODE in the host's list of samplers, and out of it again."""

from __future__ import annotations

from typing import Any

from modules import sd_samplers, sd_samplers_common

from .names import SAMPLER, STOCK


def register() -> None:
    """Offer D-ODE; in place of what had its name, for reloading the UI does not renew the list."""
    ours = sd_samplers_common.SamplerData(SAMPLER, _construct, [], stock().options)
    _set([*_others(), ours])


def unregister() -> None:
    """As if it had never been there."""
    _set(_others())


def stock() -> Any:
    """What the host knows of its own sampler."""
    return sd_samplers.all_samplers_map[STOCK]


def _construct(model: Any) -> Any:
    """When it is used: nothing of it is imported before."""
    from .sampler import DodeSampler

    return DodeSampler(model)


def _others() -> list[Any]:
    return [each for each in sd_samplers.all_samplers if each.name != SAMPLER]


def _set(samplers: list[Any]) -> None:
    """In place: the host's modules hold on to the list and the map."""
    sd_samplers.all_samplers[:] = samplers
    sd_samplers.all_samplers_map.clear()
    sd_samplers.all_samplers_map.update({each.name: each for each in samplers})
    sd_samplers.set_samplers()
    sd_samplers.get_sampler_and_scheduler.cache_clear()
