"""What tests compare with: denoisers with known solutions, and k-diffusion's own samplers."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor


def expand(sigma: Tensor, x: Tensor) -> Tensor:
    """σ of shape (batch,) beside x of shape (batch, ...)."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Gaussian:
    """The ideal denoiser of x0 ~ N(mean, std²), whose ODE has a closed form (DESIGN.md, section 3)."""

    flow: bool
    mean: float = 0.3
    std: float = 0.5

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: object) -> Tensor:
        sigma = expand(sigma, x)
        alpha = self._alpha(sigma)
        gain = alpha * self.std**2 / self._variance(sigma)
        return self.mean + gain * (x - alpha * self.mean)

    def solve(self, x: Tensor, sigma: Tensor, sigma_end: Tensor) -> Tensor:
        """The exact state at sigma_end of the ODE that passes through x at sigma; scalar σ."""
        scale = (self._variance(sigma_end) / self._variance(sigma)).sqrt()
        return self._alpha(sigma_end) * self.mean + (x - self._alpha(sigma) * self.mean) * scale

    def _alpha(self, sigma: Tensor) -> Tensor:
        return 1 - sigma if self.flow else torch.ones_like(sigma)

    def _variance(self, sigma: Tensor) -> Tensor:
        return self._alpha(sigma) ** 2 * self.std**2 + sigma**2


def two_peaks(x: Tensor, sigma: Tensor, **extra_args: object) -> Tensor:
    """E[x0 | x] where x0 is ±1 with a spread of 0.3 and x = x0 + σ·noise: nonlinear in x and in σ."""
    variance, sigma2 = 0.3**2, expand(sigma, x) ** 2
    side = torch.tanh(x / (variance + sigma2))
    return (variance * x + sigma2 * side) / (variance + sigma2)


def load_k_diffusion() -> ModuleType:
    """k-diffusion's sampling.py alone: its package's __init__ cannot be imported (DESIGN.md, section 7).

    Raises:
        ImportError: k-diffusion, or what this one module imports, is not installed.
    """
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        raise ImportError("k-diffusion is not installed")
    source = Path(next(iter(found.submodule_search_locations))) / "sampling.py"

    package = ModuleType("k_diffusion_oracle")
    package.__path__ = []
    package.utils = ModuleType("k_diffusion_oracle.utils")
    package.utils.append_dims = lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)]
    sys.modules["k_diffusion_oracle"] = package
    sys.modules["k_diffusion_oracle.utils"] = package.utils

    spec = importlib.util.spec_from_file_location("k_diffusion_oracle.sampling", source)
    sampling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sampling)
    return sampling
