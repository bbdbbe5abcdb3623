"""Which keyword arguments a row may give to its sampler: a file may come from a stranger, and a sampler from any pack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import DodeError
from .gate import Facts, is_number, json_object, shortened

_LARGEST = 1_000
_NOISE = ("eta", "s_noise")
_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "deis": ("max_order",),
    "ipndm": ("max_order",),
    "ipndm_v": ("max_order",),
    "lms": ("order",),
    "gradient_estimation": ("ge_gamma",),
    "er_sde": ("s_noise", "max_stage"),
    "euler_ancestral": _NOISE,
    "dpm_2_ancestral": _NOISE,
    "dpmpp_2s_ancestral": _NOISE,
    "dpmpp_sde": (*_NOISE, "r"),
    "dpmpp_2m_sde": _NOISE,
    "dpmpp_2m_sde_heun": _NOISE,
    "dpmpp_3m_sde": _NOISE,
    "res_multistep_ancestral": _NOISE,
    "seeds_2": (*_NOISE, "r"),
    "seeds_3": (*_NOISE, "r_1", "r_2"),
}
"""Numbers that change a deterministic run, by sampler. Where noise can be turned off, the probe tells whether it is."""


def checked_options(solver: str, options: Facts, what: str) -> Facts:
    """A detached, read-only copy of the options.

    A function of the caller's own, ``<word>``, takes what its author gave it: any name, but only numbers.

    Raises:
        DodeError: one is not a plain number, or this sampler is not known to take it.
    """
    copy = json_object(options, what)
    own = solver.startswith("<")
    for name, value in copy.items():
        if not (name.isidentifier() if own else name in _ALLOWED.get(solver, ())):
            raise DodeError(f"{what}: '{solver}' is not known to take the option {shortened(name)}")
        if not _is_plain(value):
            raise DodeError(
                f"{what}: {name} must be a number from -{_LARGEST} to {_LARGEST}, not {shortened(value)}"
            )
    return copy


def _is_plain(value: Any) -> bool:
    return is_number(value) and abs(value) <= _LARGEST
