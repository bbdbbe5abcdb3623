"""The pack's nodes, called in a few words, and ComfyUI's own sampling beside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dode_nodes import LambdaRow, LambdaTable, sample_dode
from dode_nodes.sampling import solvers
from dode_nodes.sampling.probe import probe_student
from tests.hosts.conftest import conditioning, mixture_denoised

CFG = 2.0
POSITIVE, NEGATIVE = 0.2, -0.1
LATENT_SCALE = 0.5
"""What the latent format of the models in these tests multiplies with."""

REFINED = {"steps": "4", "latents": 6, "prediction": "noise", "refine_budget": 30.0}
"""Changes for a quick distillation with refinement."""


@dataclass(frozen=True)
class NodeCalls:
    """The nodes, on small inputs; what is given changes them."""

    run: Callable[..., tuple[Any, ...]]
    pack: SimpleNamespace
    inputs: SimpleNamespace

    def distil(self, model: Any, **changes: Any) -> tuple[Any, ...]:
        """Distill λ, with Distill λ options where it has no such input."""
        own = {each.id for each in self.pack.DistillLambdas.define_schema().inputs}
        asked = self.inputs.distil | {name: value for name, value in changes.items() if name in own}
        if "options" not in asked:
            further = {name: value for name, value in changes.items() if name not in own}
            (options,) = self.run(self.pack.DistillOptions, **(self.inputs.options | further))
            asked["options"] = options
        return self.run(self.pack.DistillLambdas, model=model, **asked)

    def table(self, model: Any, **changes: Any) -> LambdaTable:
        """What Distill λ finds."""
        return self.distil(model, **changes)[0]

    def ksampler(
        self, model: Any, table: LambdaTable, latent: dict[str, Any], **changes: Any
    ) -> torch.Tensor:
        """KSampler (D-ODE), with the seed of ``ksampler``."""
        settings = {"steps": 8, "cfg": CFG, "seed": 5, "denoise": 1.0, "solver": "any"} | changes
        (result,) = self.run(
            self.pack.DodeKSampler, model=model, table=table, latent_image=latent,
            positive=self.inputs.positive, negative=self.inputs.negative, **settings,
        )  # fmt: skip
        return result["samples"]

    def sampler(self, table: LambdaTable, solver: str = "any") -> Any:
        """D-ODE sampler."""
        return self.run(self.pack.DodeSampler, table=table, solver=solver)[0]

    def sigmas(
        self, table: LambdaTable, steps: int, denoise: float = 1.0, solver: str = "any"
    ) -> torch.Tensor:
        """D-ODE sigmas."""
        return self.run(self.pack.DodeSigmas, table=table, steps=steps, denoise=denoise, solver=solver)[0]

    def apply(self, model: Any, table: LambdaTable, solver: str = "any") -> Any:
        """Apply λ to model."""
        return self.run(self.pack.ApplyLambdas, model=model, table=table, solver=solver)[0]

    def compare(self, model: Any, table: LambdaTable, **changes: Any) -> tuple[Any, ...]:
        """Compare samplers (D-ODE)."""
        settings = {"steps": 4, "solver": "any", "pictures": 3, "seed": 99, "scale": 10} | changes
        return self.run(
            self.pack.CompareSamplers, model=model, positive=self.inputs.positive, negative=self.inputs.negative,
            cfg=CFG, latent=self.inputs.latent, table=table, **settings,
        )  # fmt: skip


def saved_as(name: str, folder: Path) -> Path:
    """The one file that a table was saved as under this name: its digits are those of its numbers."""
    (path,) = folder.glob(f"{name}-????????.safetensors")
    assert path.stem.endswith(LambdaTable.load(path).sha256[:8])
    return path


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, as it was called by who saved it: without digits and ending."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(re.sub(r"-[0-9a-f]{8}(_\d{5})?\.safetensors$", r"\1", name) for name in names)


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference."""
    return float((a - b).square().mean().sqrt())


def empty(batch: int = 1) -> dict[str, torch.Tensor]:
    """An empty latent."""
    return {"samples": torch.zeros(batch, 4, 4, 4)}


def filled() -> dict[str, torch.Tensor]:
    """A latent with something in it, for img2img."""
    return {"samples": torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))}


def ksampler(model: Any, latent: dict[str, Any], *, sampler: str = "euler", scheduler: str = "karras",
             steps: int = 8, denoise: float = 1.0, seed: int = 5, mask: Any = None) -> torch.Tensor:  # fmt: skip
    """The path of ComfyUI's own KSampler node."""
    import comfy.sample

    noise = comfy.sample.prepare_noise(latent["samples"], seed)
    return comfy.sample.sample(
        model, noise, steps, CFG, sampler, scheduler, conditioning(POSITIVE), conditioning(NEGATIVE),
        latent["samples"], denoise=denoise, seed=seed, noise_mask=mask,
    )  # fmt: skip


def sample_custom(
    model: Any, sampler: Any, sigmas: torch.Tensor, latent: dict[str, Any], seed: int = 5
) -> torch.Tensor:
    """The path of ComfyUI's own SamplerCustom node; a sampler may be given by its name."""
    import comfy.sample
    import comfy.samplers

    by = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    noise = comfy.sample.prepare_noise(latent["samples"], seed)
    return comfy.sample.sample_custom(
        model, noise, CFG, by, sigmas, conditioning(POSITIVE), conditioning(NEGATIVE), latent["samples"], seed=seed
    )  # fmt: skip


def by_the_library(row: LambdaRow, kind: str) -> torch.Tensor:
    """Three latents of seed 5, with our own solver, a hand-written guidance and the closed form."""
    import comfy.sample

    flow = kind == "FLOW"
    noise = comfy.sample.prepare_noise(torch.zeros(3, 4, 4, 4), 5)
    x = noise if flow else noise * torch.sqrt(1 + torch.tensor(row.sigmas[0]) ** 2).float()

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = (
            mixture_denoised(x, sigma, offset, flow) for offset in (POSITIVE, NEGATIVE)
        )
        return unconditional + CFG * (conditional - unconditional)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "_host_lookup", None)
        return sample_dode(denoiser, x, row.sigmas, row=row, disable=True)


def zero_table(model: Any, solver: str, steps: int = 8, scheduler: str = "karras") -> LambdaTable:
    """λ = 0 on the schedule of a KSampler."""
    from dode_nodes.hosts.comfy.host_samplers import what_samplers_look_for
    from dode_nodes.hosts.comfy.job import schedule
    from dode_nodes.hosts.comfy.model_facts import model_facts

    sigmas = schedule(model, solver, scheduler, steps).sigmas
    queries = probe_student(solvers.resolve(solver), sigmas, model=what_samplers_look_for())
    row = LambdaRow(solver, sigmas.double().numpy(), queries.per_step, [0.0] * len(queries.sigmas))
    return LambdaTable([row], model=model_facts(model))
