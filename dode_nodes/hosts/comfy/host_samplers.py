"""ComfyUI's samplers by name, and which of them can be distilled or be the teacher."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace

import comfy.model_sampling
import comfy.samplers
import torch

from ...errors import IneligibleSampler
from ...fit.teacher import Teacher
from ...sampling.probe import probe_student, probe_teacher
from ...sampling.solvers import SOLVERS, Sampler, resolve

_SIGMAS = torch.tensor([14.0, 5.0, 2.0, 0.7, 0.0])
_GRID = (
    Teacher(scale=4, flow=False).grid([_SIGMAS.tolist()], [_SIGMAS]).float()
)  # unequal steps, as teachers get
_verdicts: dict[tuple[str, Sampler], tuple[bool, bool]] = {}


def host_sampler(name: str) -> Sampler | None:
    """The function behind a name in ComfyUI's drop-down, as it is now: other packs reload and replace."""
    if name not in comfy.samplers.SAMPLER_NAMES:
        return None
    return getattr(comfy.samplers.sampler_object(name), "sampler_function", None)


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
    return list(dict.fromkeys([*comfy.samplers.SAMPLER_NAMES, *SOLVERS]))


def _verdict(name: str) -> tuple[bool, bool]:
    try:
        sampler = resolve(name)
    except (ValueError, AttributeError):  # a name that another pack lists without a function behind it
        return False, False
    key = (name, _identity(sampler))
    if key not in _verdicts:
        _verdicts[key] = _passes(probe_student, sampler, _SIGMAS), _passes(probe_teacher, sampler, _GRID)
    return _verdicts[key]


def _identity(sampler: Sampler) -> Sampler:
    """The function's code: ComfyUI makes some functions anew at every look."""
    return getattr(sampler, "__code__", sampler)


def _passes(probe: Callable[..., object], sampler: Sampler, sigmas: torch.Tensor) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of samplers that nobody has chosen
        try:
            probe(sampler, sigmas, model=what_samplers_look_for())
        except IneligibleSampler:
            return False
    return True


def what_samplers_look_for(*, flow: bool = False) -> SimpleNamespace:
    """What ComfyUI's samplers look for behind the denoiser, of an EPS model or a rectified flow: the model's σ."""
    ms = comfy.model_sampling
    bases = (ms.ModelSamplingDiscreteFlow, ms.CONST) if flow else (ms.ModelSamplingDiscrete, ms.EPS)
    sampling = type("ModelSampling", bases, {})()
    patcher = SimpleNamespace(get_model_object=lambda name: sampling, model_options={})
    guider = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling), model_patcher=patcher)
    return SimpleNamespace(inner_model=guider, sigmas=_SIGMAS)
