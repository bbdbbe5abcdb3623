"""Loads the embedded models of digits.

model = load_demo_model("eps")
sigmas = make_sigmas("karras", 8, model.noise_schedule)
labels = torch.arange(10)
latents = sample_euler(model.denoiser(), model.noise(range(10)), sigmas, extra_args={"labels": labels})
pictures = decode_to_picture(latents)
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import DodeError
from ..sampling.denoiser import Denoiser, over_latent
from ..sampling.schedules import NoiseSchedule
from .networks import LATENT_CHANNELS, UNCONDITIONAL, DigitClassifier, DigitUNet

KINDS = ("eps", "flow")

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class DemoModel:
    """A diffusion model of digits. Get one from `load_demo_model`.

    Attributes:
        kind: "eps" predicts the noise ε on Stable Diffusion's schedule, x = x0 + σ·noise; "flow" the
            velocity of a rectified flow, x = (1 − σ)·x0 + σ·noise.
        network: what predicts; evaluated in its weights' dtype, whatever the dtype of x.
        noise_schedule: the σ it was trained on.
    """

    kind: str
    network: DigitUNet
    noise_schedule: NoiseSchedule

    latent_shape = (LATENT_CHANNELS, 8, 8)

    @property
    def sigmas(self) -> Tensor:
        """(1000,) float32, ascending: every σ of the schedule."""
        return self.noise_schedule.sigmas

    @property
    def sigma_min(self) -> float:
        return self.noise_schedule.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.noise_schedule.sigma_max

    def to(self, *args: Any, **kwargs: Any) -> DemoModel:
        """A model with its network elsewhere or in another dtype, as `torch.nn.Module.to`; self stays."""
        return dataclasses.replace(self, network=copy.deepcopy(self.network).to(*args, **kwargs))

    def denoiser(self, cfg: float = 2.0) -> Denoiser:
        """The model in k-diffusion's convention, `model(x, sigma, labels=labels) -> denoised`.

        labels, (B,) int64, come through the sampler's extra_args; other extra_args have no effect. x is
        (B, 4, H, W) of any floating-point dtype, sigma (B,); denoised has x's shape and dtype.

        Args:
            cfg: scale of classifier-free guidance, D_u + cfg·(D_c − D_u), from one evaluation of 2·B
                latents. At 1 it is D_c, from one of B.

        Raises:
            DodeError: (the denoiser) labels are missing or not one per latent.
        """

        def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None = None, **_: Any) -> Tensor:
            if labels is None or labels.shape != (len(x),):
                found = "is missing" if labels is None else f"has the shape {tuple(labels.shape)}"
                raise DodeError(
                    f'extra_args["labels"] {found}; it must hold one digit for each of {len(x)} latents'
                )
            labels = labels.to(x.device)
            if cfg == 1:
                return self.denoised(x, sigma, labels)
            both_labels = torch.cat([torch.full_like(labels, UNCONDITIONAL), labels])
            both = self.denoised(torch.cat([x, x]), torch.cat([sigma, sigma]), both_labels)
            unconditional, conditional = both.chunk(2)
            return unconditional + cfg * (conditional - unconditional)

        return denoise

    def denoised(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """D(x; σ) without guidance: x (B, 4, H, W), sigma (B,), labels (B,) with `UNCONDITIONAL` allowed."""
        sigma_x = over_latent(sigma, x)
        network_input = x / (sigma_x**2 + 1).sqrt() if self.kind == "eps" else x
        output = self.network(network_input.to(self.network.dtype), self.timestep(sigma), labels)
        denoised: Tensor = x - sigma_x * output.to(x.dtype)
        return denoised

    def timestep(self, sigma: Tensor) -> Tensor:
        """The network's timestep at sigma, (B,), without the host's rounding, so that D is continuous in σ.

        "eps": linear in log σ between the schedule's entries and constant beyond them; "flow": 1000·σ.
        """
        sigma = sigma.to(torch.promote_types(sigma.dtype, torch.float32))  # half precision knows no 999.5
        if self.kind == "flow":
            return sigma * 1000
        log_sigma, log_sigmas = sigma.log(), self.sigmas.to(sigma).log()
        above = torch.searchsorted(log_sigmas, log_sigma).clamp(1, len(log_sigmas) - 1)
        start, end = log_sigmas[above - 1], log_sigmas[above]
        return above - 1 + ((log_sigma - start) / (end - start)).clamp(0, 1)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Initial latents at sigma_max, one for each seed, whatever other seeds there are.

        Returns:
            (len(seeds), 4, 8, 8) on the network's device, scaled as in ComfyUI at full denoise; float64
            for a float64 network, else float32. Both are the same noise, drawn in float32 on the CPU.
        """
        drawn = [
            torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        weight = self.network.enter.weight
        noise = torch.stack(drawn).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        return noise * math.sqrt(1 + self.sigma_max**2) if self.kind == "eps" else noise


def load_demo_model(
    kind: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DemoModel:
    """The embedded model of this kind, "eps" or "flow", its weights in `dtype` (they are stored as float16).

    Raises:
        DodeError: unknown kind, or the weights are missing or unusable.
    """
    if kind not in KINDS:
        raise DodeError(f"no demo model is called {kind!r}; there are {', '.join(KINDS)}")
    network = _load_weights(DigitUNet(), kind).to(device, dtype)
    return DemoModel(kind, network, noise_schedule(kind))


def load_classifier() -> DigitClassifier:
    """The embedded classifier of digits, float32 on the CPU.

    Raises:
        DodeError: its weights are missing or unusable.
    """
    return _load_weights(DigitClassifier(), "classifier")


def noise_schedule(kind: str) -> NoiseSchedule:
    """The schedule on which the demo model of this kind is trained."""
    return NoiseSchedule.stable_diffusion() if kind == "eps" else NoiseSchedule.rectified_flow()


def _load_weights(module: Network, name: str) -> Network:
    """`module` with the weights of this name, for inference."""
    file = resources.files(__package__) / "weights" / f"{name}.safetensors"
    try:
        module.load_state_dict(safetensors.torch.load(file.read_bytes()))
    except FileNotFoundError:
        raise DodeError(f"{file}: missing; make it with python -m dode_nodes.demo.train {name}") from None
    except (SafetensorError, RuntimeError) as error:  # not safetensors; another network's weights
        raise DodeError(f"{file}: not the weights of a {type(module).__name__}: {error}") from error
    return module.requires_grad_(False).eval()
