"""Schedules of σ outside a host, equal to those that ComfyUI 0.3.64 calculates for the same model.

make_sigmas("karras", 8, NoiseSchedule.stable_diffusion())
make_sigmas("simple", 8, NoiseSchedule.rectified_flow(shift=3.0))
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ..errors import DodeError


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The σ a model was trained on, and how its network's timestep relates to them.

    Make one with `stable_diffusion`, `discrete` or `rectified_flow`. σ is in k-diffusion's terms: x = x0 + σ·noise, for
    flow models x = (1 − σ)·x0 + σ·noise.

    Attributes:
        sigmas: float32, ascending; mostly 1000.
    """

    sigmas: Tensor

    @staticmethod
    def stable_diffusion() -> NoiseSchedule:
        """Stable Diffusion 1, 2 and XL: β from 0.00085 to 0.012, linear in √β, so σ from 0.029 to 14.6."""
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas_cumprod = (1 - betas).cumprod(0)
        return NoiseSchedule.discrete(((1 - alphas_cumprod) / alphas_cumprod).sqrt())

    @staticmethod
    def discrete(sigmas: Tensor) -> NoiseSchedule:
        """Of a model with a table of σ, ascending."""
        return _DiscreteSchedule(sigmas.float(), sigmas.log().float())

    @staticmethod
    def rectified_flow(shift: float = 1.0) -> NoiseSchedule:
        """Rectified flow: σ(t) = shift·t / (1 + (shift − 1)·t) with t from 0.001 to 1. SD3's shift is 3.

        Raises:
            DodeError: shift is not positive.
        """
        if not shift > 0:
            raise DodeError(f"shift must be positive, not {shift}")
        return _FlowSchedule(_shifted(shift, torch.arange(1, 1001) / 1000), shift)

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def timestep(self, sigma: Tensor) -> Tensor:
        """The network's timestep at `sigma`, in the host's definition; any shape."""
        raise NotImplementedError

    def sigma(self, timestep: Tensor) -> Tensor:
        """σ at `timestep`, in the host's definition; any shape."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class _DiscreteSchedule(NoiseSchedule):
    """Timesteps 0 … 999 index the table; between them log σ is linear."""

    log_sigmas: Tensor

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma.log()[..., None] - self.log_sigmas).abs().argmin(-1)

    def sigma(self, timestep: Tensor) -> Tensor:
        timestep = timestep.float().clamp(0, len(self.log_sigmas) - 1)
        low, high = self.log_sigmas[timestep.floor().long()], self.log_sigmas[timestep.ceil().long()]
        weight = timestep.frac()
        return ((1 - weight) * low + weight * high).exp()


@dataclass(frozen=True, eq=False)
class _FlowSchedule(NoiseSchedule):
    """Timesteps 0 … 1000. As in the host `sigma` applies the shift and `timestep` does not take it back."""

    shift: float

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * 1000

    def sigma(self, timestep: Tensor) -> Tensor:
        return _shifted(self.shift, timestep / 1000)


def _shifted(shift: float, t: Tensor) -> Tensor:
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def schedules_of(noise_schedule: NoiseSchedule) -> Callable[[str, int, bool], Tensor]:
    """``make_sigmas`` for one model, as a race asks for schedules."""

    def of(name: str, steps: int, discard_penultimate: bool) -> Tensor:
        return make_sigmas(name, steps, noise_schedule, discard_penultimate=discard_penultimate)

    return of


def make_sigmas(
    name: str, steps: int, noise_schedule: NoiseSchedule, *, discard_penultimate: bool = False
) -> Tensor:
    """The σ at which a sampler visits a model, as ComfyUI's nodes compute them.

    Args:
        name: one of `SCHEDULES`.
        steps: at least 1.
        discard_penultimate: make one step more and leave out the σ before 0, as ComfyUI's KSampler does
            for dpm_2, dpm_2_ancestral, uni_pc and uni_pc_bh2.

    Returns:
        (steps + 1,) float32 on the CPU, strictly descending to 0. As in the host, two schedules may give
        another number: ddim_uniform more where its stride is rounded (7 for 6, 8 for 7, 12 for 11, …), beta
        less where its σ coincide (from 139 steps). ddim_uniform starts up to a stride below σ_max: with one
        step at the second lowest σ of all.

    Raises:
        DodeError: unknown name, steps below 1, or a number of steps that this schedule cannot do
            (kl_optimal needs 2; simple has no more than the table has σ).
    """
    if name not in _FUNCTIONS:
        close = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise DodeError(f"no schedule is called {name!r}{hint}; there are {', '.join(SCHEDULES)}")
    if steps < 1:
        raise DodeError(f"steps must be at least 1, not {steps}")
    sigmas = _FUNCTIONS[name](noise_schedule, steps + 1 if discard_penultimate else steps)
    if discard_penultimate:
        sigmas = sigmas[:-1]
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    if not (sigmas.diff() < 0).all():  # nor where one is NaN
        raise DodeError(f"the schedule {name} cannot have {steps} step{'s' if steps > 1 else ''}")
    return sigmas


# Each returns the σ of its steps' starts, without the closing 0.


def _karras(s: NoiseSchedule, steps: int) -> Tensor:
    """Karras et al. 2022 (arXiv:2206.00364), Eq. 5."""
    rho = 7.0
    start, end = s.sigma_max ** (1 / rho), s.sigma_min ** (1 / rho)
    sigmas: Tensor = (start + torch.linspace(0, 1, steps) * (end - start)) ** rho
    return sigmas


def _exponential(s: NoiseSchedule, steps: int) -> Tensor:
    """Equal steps in log σ."""
    return torch.linspace(math.log(s.sigma_max), math.log(s.sigma_min), steps).exp()


def _simple(s: NoiseSchedule, steps: int) -> Tensor:
    """Equal steps down the table, from its last entry."""
    stride = len(s.sigmas) / steps
    return s.sigmas[[-1 - int(i * stride) for i in range(steps)]]


def _ddim_uniform(s: NoiseSchedule, steps: int) -> Tensor:
    """Equal whole steps up the table, from its second entry."""
    stride = max(len(s.sigmas) // steps, 1)
    return s.sigmas[1::stride].flip(0)


def _normal(s: NoiseSchedule, steps: int) -> Tensor:
    """Equal steps in the timestep, from that of σ_max to that of σ_min."""
    start, end = s.timestep(s.sigmas[[-1, 0]]).tolist()
    return s.sigma(torch.linspace(start, end, steps))


def _sgm_uniform(s: NoiseSchedule, steps: int) -> Tensor:
    """`normal` with one step more, the last of which is left out."""
    return _normal(s, steps + 1)[:-1]


def _beta(s: NoiseSchedule, steps: int) -> Tensor:
    """Quantiles of the Beta(0.6, 0.6) distribution along the table (Lee et al. 2024, arXiv:2407.12173)."""
    try:
        from scipy.special import betaincinv
    except ImportError as error:
        raise DodeError("the schedule beta needs scipy: pip install scipy") from error
    levels = 1 - torch.arange(steps, dtype=torch.float64) / steps
    indices = torch.from_numpy(betaincinv(0.6, 0.6, levels.numpy()) * (len(s.sigmas) - 1)).round().long()
    return s.sigmas[torch.unique_consecutive(indices)]


def _linear_quadratic(s: NoiseSchedule, steps: int) -> Tensor:
    """Noise removed: linear up to 2.5 % over half of the steps, then quadratic (Polyak et al. 2024,
    arXiv:2410.13720, as in Genmo's Mochi)."""
    if steps == 1:
        return s.sigmas[[-1]]
    linear_steps = steps // 2
    slope = 0.025 / linear_steps
    bend = (1 - slope * steps) / (steps - linear_steps) ** 2
    removed = [slope * i + bend * max(i - linear_steps, 0) ** 2 for i in range(steps)]
    return torch.tensor([1 - r for r in removed]) * s.sigma_max


def _kl_optimal(s: NoiseSchedule, steps: int) -> Tensor:
    """Equal steps in arctan σ (Sabour et al. 2024, arXiv:2404.14507)."""
    weight = torch.arange(steps, dtype=torch.float32) / (steps - 1)
    return (weight * math.atan(s.sigma_min) + (1 - weight) * math.atan(s.sigma_max)).tan()


_FUNCTIONS: Mapping[str, Callable[[NoiseSchedule, int], Tensor]] = MappingProxyType(
    {
        "simple": _simple,
        "sgm_uniform": _sgm_uniform,
        "karras": _karras,
        "exponential": _exponential,
        "ddim_uniform": _ddim_uniform,
        "beta": _beta,
        "normal": _normal,
        "linear_quadratic": _linear_quadratic,
        "kl_optimal": _kl_optimal,
    }
)
SCHEDULES = tuple(_FUNCTIONS)
