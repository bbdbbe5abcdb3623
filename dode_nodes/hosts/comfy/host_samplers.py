"""ComfyUI's samplers by name, and which of them can be distilled or be the teacher."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.samplers
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import IneligibleSampler
from ...fit.teacher import Teacher
from ...sampling.probe import probe_repeatable, probe_student, probe_teacher
from ...sampling.solvers import SOLVERS, Sampler, identity, resolve, sample_euler

_SIGMAS = torch.tensor([14.0, 5.0, 2.0, 0.7, 0.0])
_GRID = (
    Teacher(scale=4, flow=False).grid([_SIGMAS.tolist()], [_SIGMAS]).float()
)  # unequal steps, as teachers get
_TWO_STEPS = torch.tensor([14.0, 2.0, 0.0])
_PATIENCE = 20
"""Times as long as Euler's method. ComfyUI's own samplers take up to six; RES4LYF's, from 60 on, would take minutes."""
_CPU = torch.device("cpu")
_verdicts: dict[tuple[str, object], tuple[bool, bool]] = {}


def host_sampler(name: str) -> Sampler | None:
    """The function behind a name in ComfyUI's drop-down, as it is now: other packs reload and replace."""
    if name not in comfy.samplers.SAMPLER_NAMES:
        return None
    return getattr(comfy.samplers.sampler_object(name), "sampler_function", None)


def host_names() -> list[str]:
    """The names in that drop-down."""
    return list(comfy.samplers.SAMPLER_NAMES)


def inpaint_options(name: str) -> dict[str, Any]:
    """What ComfyUI's sampler of this name does apart where there is a mask."""
    if name not in comfy.samplers.SAMPLER_NAMES:
        return {}
    return dict(getattr(comfy.samplers.sampler_object(name), "inpaint_options", {}))


def student_names() -> list[str]:
    """The samplers that can be distilled: this ComfyUI's, other packs' included, and our own."""
    return [name for name in _names() if _verdict(name)[0]]


def teacher_names() -> list[str]:
    """The samplers that ask exactly the σ they are given."""
    return [name for name in _names() if _verdict(name)[1]]


def same_function(a: Sampler, b: Sampler) -> bool:
    """Whether two are one sampler, though its module may have been reloaded in between."""
    return a is b or (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)


def _names() -> list[str]:
    return list(dict.fromkeys([*host_names(), *SOLVERS]))


def _verdict(name: str) -> tuple[bool, bool]:
    """Whether it can be distilled, and be the teacher.

    Of a slow sampler only so much is asked as a list can wait for. The rest is found when it is chosen, before the
    teacher runs.
    """
    try:
        sampler = resolve(name)
    except (ValueError, AttributeError):  # a name that another pack lists without a function behind it
        return False, False
    key = (name, identity(sampler))
    if key not in _verdicts:
        repeatable, seconds = _first_look(sampler)
        if not repeatable or seconds > _PATIENCE * _seconds_of_euler():
            _verdicts[key] = repeatable, False
        else:
            _verdicts[key] = _passes(probe_student, sampler, _SIGMAS), _passes(probe_teacher, sampler, _GRID)
    return _verdicts[key]


def _first_look(sampler: Sampler) -> tuple[bool, float]:
    """Whether two runs end at one result, and what they take of this thread's time."""
    began = time.thread_time()
    repeatable = _passes(probe_repeatable, sampler, _TWO_STEPS)
    return repeatable, time.thread_time() - began


@cache
def _seconds_of_euler() -> float:
    return min(_first_look(sample_euler)[1] for _ in range(3))


def _passes(probe: Callable[..., object], sampler: Sampler, sigmas: torch.Tensor) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of samplers that nobody has chosen
        try:
            probe(sampler, sigmas, model=what_samplers_look_for())
        except IneligibleSampler:
            return False
    return True


class _Config(comfy.supported_models_base.BASE):
    """Of a model without a network."""

    sampling_settings: ClassVar[dict[str, Any]] = {}
    latent_format = comfy.latent_formats.SD15

    def __init__(self) -> None:
        super().__init__({"disable_unet_model_creation": True, "in_channels": 4})


def what_samplers_look_for(*, flow: bool = False) -> comfy.samplers.KSamplerX0Inpaint:
    """What stands behind the denoiser in ComfyUI, for an EPS model or a rectified flow that has no network."""
    kind = comfy.model_base.ModelType.FLOW if flow else comfy.model_base.ModelType.EPS
    model = comfy.model_base.BaseModel(_Config(), kind, device=_CPU)
    model.diffusion_model = torch.nn.Module()
    guider = comfy.samplers.CFGGuider(ModelPatcher(model, _CPU, _CPU))
    guider.inner_model, guider.conds = model, {}
    return comfy.samplers.KSamplerX0Inpaint(guider, _SIGMAS)
