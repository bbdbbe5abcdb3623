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
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import DodeError
from ..sampling.denoiser import Denoiser, over_latent
from ..sampling.schedules import NoiseSchedule, make_sigmas
from ..tables.fingerprint import fingerprint
from .networks import CLASSES, LATENT_CHANNELS, UNCONDITIONAL, DigitClassifier, DigitUNet, UNet
from .vae import decode_to_picture

if TYPE_CHECKING:
    from importlib.abc import Traversable

KINDS = ("eps", "flow")
"""Of the digits' models."""

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class DemoModel:
    """A diffusion model of the demo. Get one from `load_demo_model`, or a colour model from `load_colour_model`.

    Attributes:
        kind: "eps" predicts the noise ε on Stable Diffusion's schedule, x = x0 + σ·noise; "flow" the
            velocity of a rectified flow, x = (1 − σ)·x0 + σ·noise.
        network: what predicts; evaluated in its weights' dtype, whatever the dtype of x.
        noise_schedule: the σ it was trained on.
        latent_shape: (C, H, W), that it was trained on.
        unconditional: the label for nothing in particular; None for a network without labels, which has no guidance.
    """

    kind: str
    network: UNet
    noise_schedule: NoiseSchedule
    latent_shape: tuple[int, int, int] = (LATENT_CHANNELS, 8, 8)
    unconditional: int | None = UNCONDITIONAL

    @property
    def name(self) -> str:
        """As the command line calls it."""
        return self.kind

    @property
    def facts(self) -> dict[str, Any]:
        """What a table says of it: what every host finds out of a model."""
        return {
            "name": f"embedded {self.family.removeprefix('demo-')}",
            "family": self.family,
            "prediction_type": self.kind,
            "channels": self.latent_shape[0],
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "fingerprint": fingerprint(self.network.state_dict().values()),
        }

    @property
    def family(self) -> str:
        """By its neutral name."""
        return "demo-digits"

    @property
    def subjects(self) -> Sequence[str]:
        """What to ask it for, in turns, where nobody says."""
        return [str(digit) for digit in range(CLASSES)]

    @property
    def fitted_on(self) -> Sequence[str]:
        """What a table is fitted on, in turns, where nobody says: all that people may ask for."""
        return self.subjects

    def labels(self, texts: Sequence[str]) -> Tensor:
        """The denoiser's `labels` for these subjects, (B,) int64."""
        return torch.tensor([int(text) for text in texts])

    def pictures(self, latents: Tensor) -> Tensor:
        """What is shown of latents: (B, H, W), grey, or (B, H, W, 3), in [0, 1], on the CPU."""
        return decode_to_picture(latents).squeeze(1).cpu()

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

    def make_sigmas(self, schedule: str, steps: int, discard_penultimate: bool) -> Tensor:
        """A schedule of the model's; see `dode_nodes.sampling.schedules.make_sigmas`."""
        return make_sigmas(schedule, steps, self.noise_schedule, discard_penultimate=discard_penultimate)

    def to(self, *args: Any, **kwargs: Any) -> DemoModel:
        """A model with its network elsewhere or in another dtype, as `torch.nn.Module.to`; self stays."""
        return dataclasses.replace(self, network=copy.deepcopy(self.network).to(*args, **kwargs))

    def denoiser(self, cfg: float = 2.0) -> Denoiser:
        """The model in k-diffusion's convention, `model(x, sigma, labels=labels) -> denoised`.

        labels, (B,) or (B, …) int64, come through the sampler's extra_args; other extra_args have no effect. x
        is (B, C, H, W) of any floating-point dtype, sigma (B,); denoised has x's shape and dtype.

        Args:
            cfg: scale of classifier-free guidance, D_u + cfg·(D_c − D_u), from one evaluation of 2·B
                latents. At 1 it is D_c, from one of B.

        Raises:
            DodeError: (the denoiser) labels are missing or not one per latent.
        """

        def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None = None, **_: Any) -> Tensor:
            if self.unconditional is None:
                return self.denoised(x, sigma)
            if labels is None or labels.shape[:1] != (len(x),):
                found = "is missing" if labels is None else f"has the shape {tuple(labels.shape)}"
                raise DodeError(
                    f'extra_args["labels"] {found}; it must hold one label for each of {len(x)} latents'
                )
            labels = labels.to(x.device)
            if cfg == 1:
                return self.denoised(x, sigma, labels)
            both_labels = torch.cat([torch.full_like(labels, self.unconditional), labels])
            both = self.denoised(torch.cat([x, x]), torch.cat([sigma, sigma]), both_labels)
            unconditional, conditional = both.chunk(2)
            return unconditional + cfg * (conditional - unconditional)

        return denoise

    def denoised(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """D(x; σ) without guidance: x (B, C, H, W), sigma (B,), labels (B, …), `unconditional` allowed."""
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
            (len(seeds), C, H, W) on the network's device, scaled as in ComfyUI at full denoise; float64
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
    network = load_weights(DigitUNet(), _file(kind), f"python -m dode_nodes.demo.train {kind}").to(
        device, dtype
    )
    return DemoModel(kind, network, noise_schedule(kind))


def load_classifier() -> DigitClassifier:
    """The embedded classifier of digits, float32 on the CPU.

    Raises:
        DodeError: its weights are missing or unusable.
    """
    return load_weights(DigitClassifier(), _file("classifier"), "python -m dode_nodes.demo.train classifier")


def noise_schedule(kind: str) -> NoiseSchedule:
    """The schedule on which the demo model of this kind is trained."""
    return NoiseSchedule.stable_diffusion() if kind == "eps" else NoiseSchedule.rectified_flow()


def weights_folder() -> Traversable:
    """Where the weights are: of this package by whatever name, for in ComfyUI it has another."""
    return resources.files(__package__) / "weights"


def _file(name: str) -> Traversable:
    return weights_folder() / f"{name}.safetensors"


def load_weights(module: Network, file: Traversable, command: str) -> Network:
    """`module` with the weights of a file, for inference.

    Raises:
        DodeError: they are missing, and `command` would make them; or they are another network's.
    """
    try:
        module.load_state_dict(safetensors.torch.load(file.read_bytes()))
    except FileNotFoundError:
        raise DodeError(f"{file}: missing; make it with {command}") from None
    except (SafetensorError, RuntimeError) as error:  # not safetensors; another network's weights
        raise DodeError(f"{file}: not the weights of a {type(module).__name__}: {error}") from error
    return module.requires_grad_(False).eval()
