"""Between their code and ours: the model as they call it, imports from their checkouts, and what each method measures."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from common import MICRO_BATCH, Bench, sample_group
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from dode_nodes.demo.models import DemoModel
from dode_nodes.demo.networks import CLASSES
from dode_nodes.sampling.schedules import make_sigmas

BUDGET = 300_000
"""Most evaluations that a fit for one number of steps may cost; where the authors' images cost more, it gets fewer."""
FINE = 40
"""Steps of the teacher that is given where the authors work on finished pictures from files."""
POLYNOMIAL = {"schedule_type": "polynomial", "schedule_rho": 7}
DISCRETE = {"schedule_type": "discrete", "schedule_rho": 1}
TIME_UNIFORM = {"schedule_type": "time_uniform", "schedule_rho": 1}


@dataclass(frozen=True)
class Outcome:
    """A fitted solver on the test latents.

    Attributes:
        images: initial latents that it was fitted on.
        fitting: evaluations that the fit cost.
        states: where the test latents ended.
        per_latent: evaluations that each of them cost.
    """

    solver: str
    settings: str
    images: int
    fitting: int
    states: Tensor
    per_latent: float


class NotPossible(Exception):
    """The method has no solver with so many evaluations."""


@dataclass(frozen=True)
class Method:
    """How a method is measured, and with which options.

    Attributes:
        measure: for a bench, evaluations, the folder of its modules and a variant.
        repository: its code, "owner/name" on GitHub, "owner/name@branch" if not the default; None for ours.
        inside: where its modules are in a checkout.
    """

    measure: Callable[..., Outcome]
    variants: tuple[Any, ...]
    repository: str | None = None
    inside: str = ""

    def folder(self, checkouts: Path) -> Path | None:
        """Its modules, where each checkout has its repository's name."""
        if self.repository is None:
            return None
        name = self.repository.split("/")[1].split("@")[0]
        return checkouts.resolve() / name / self.inside


class Net:
    """Our model behind the interface of theirs; counts evaluations, three for one that is differentiated.

    Labels may come as digits or, as EDM's networks have them, one-hot.
    """

    label_dim = CLASSES

    def __init__(self, model: DemoModel, cfg: float) -> None:
        self.demo = model
        self.img_channels, self.img_resolution, _ = model.latent_shape
        self.sigma_min, self.sigma_max = model.sigma_min, model.sigma_max
        self.evaluations = 0
        self._denoise = model.denoiser(cfg)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        labels = condition if class_labels is None else class_labels
        if labels.ndim == 2:
            labels = labels.argmax(1)
        denoised = self._denoise(x, sigma.to(x).reshape(-1).expand(len(x)), labels=labels)
        self.evaluations += len(x) * (3 if denoised.requires_grad else 1)
        return denoised

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        """σ itself: our timestep is continuous in it."""
        return torch.as_tensor(sigma)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """The timestep at σ."""
        return self.demo.timestep(sigma)

    def sigma(self, timestep: Tensor) -> Tensor:
        """σ at a timestep."""
        return self.demo.noise_schedule.sigma(timestep)


class GuidedNet(Net):
    """`Net` as AMED and EPD have Stable Diffusion: guidance inside, and a bottleneck that it can hook into."""

    def __init__(self, model: DemoModel, cfg: float) -> None:
        super().__init__(model, cfg)
        self.guidance_type = "uncond" if cfg == 1 else "classifier-free"
        self._bottleneck = nn.Identity()
        unet = SimpleNamespace(middle_block=self._bottleneck)
        self.model = SimpleNamespace(model=SimpleNamespace(diffusion_model=unet))

    @contextlib.contextmanager
    def bottleneck(self) -> Iterator[None]:
        """Meanwhile their hooks see our 4×4 bottleneck as the 8×8 that their predictor reads."""

        def show(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._bottleneck(functional.interpolate(output.detach(), scale_factor=2.0))

        hook = self.demo.network.middle[-1].register_forward_hook(show)
        try:
            yield
        finally:
            hook.remove()


class VariancePreserving:
    """Our model for code that wants latents x / √(1 + σ²), and the noise that the model sees in them.

    Attributes:
        net: what is asked, and counts.
        alphas_cumprod: of the schedule's 1000 σ, ascending.
    """

    def __init__(self, model: DemoModel, cfg: float) -> None:
        self.net = Net(model, cfg)
        self.alphas_cumprod = 1 / (1 + model.sigmas.double() ** 2)

    def noise(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """What it sees in such latents at σ, () or (1,)."""
        exploding = x * (1 + sigma**2).sqrt()
        return (exploding - self.net(exploding, sigma, labels)) / sigma

    def initial(self, x: Tensor) -> Tensor:
        """Our initial latents as such code has them."""
        return x / (1 + self.net.sigma_max**2) ** 0.5

    def final(self, x: Tensor) -> Tensor:
        """Its latents at σ_min as we have them."""
        return x * (1 + self.net.sigma_min**2) ** 0.5


@contextlib.contextmanager
def checkout(folder: Path, *unused: str) -> Iterator[Callable[[str], ModuleType]]:
    """Import from a checkout: its modules are forgotten afterwards, for the next has some of the same names.

    Args:
        unused: modules that it imports and that are not needed here: they need not be installed.
    """
    before, bytecode = set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    sys.modules.update({name: MagicMock() for name in unused})
    try:
        yield importlib.import_module
    finally:
        sys.dont_write_bytecode = bytecode
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            source = Path(getattr(sys.modules[name], "__file__", None) or "/")
            if name in unused or source.is_relative_to(folder):
                del sys.modules[name]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """They print every update, and torch warns of how they copy a σ."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Meanwhile ``tensor.cuda()`` is the tensor: some of them know no other device."""
    return patch.object(Tensor, "cuda", lambda tensor: tensor)


def on_test_latents(
    bench: Bench, net: Net, sample: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, float]:
    """The states where ``sample(x, labels)`` ends, and the evaluations that each latent cost."""
    before, group = net.evaluations, bench.test
    with torch.no_grad():
        states = torch.cat([
            sample(group.x[part], group.extra_args(part)["labels"])
            for part in torch.arange(len(group.x)).split(MICRO_BATCH)
        ])  # fmt: skip
    return states, (net.evaluations - before) / len(group.x)


def batches(bench: Bench, images: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh latents and their labels for every update."""
    (group,) = bench.fit_latents(images).groups
    for part in tqdm(torch.arange(images).split(batch), desc="updates", leave=False, disable=None):
        yield group.x[part], group.extra_args(part)["labels"]


def finished(bench: Bench, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """So many latents, their labels, and where they end at σ = 0, each for `FINE` evaluations."""
    (group,) = bench.fit_latents(images).groups
    sigmas = make_sigmas("karras", FINE, bench.model.noise_schedule)
    labels = group.extra_args(torch.arange(images))["labels"]
    return group.x, labels, sample_group(group, sigmas, "dpmpp_2m", None)


def images_within(budget: int, cost: int, wanted: int, batch: int) -> int:
    """How many of the wanted images, in whole batches, the budget pays at this cost of each."""
    return min(wanted, budget // cost) // batch * batch
