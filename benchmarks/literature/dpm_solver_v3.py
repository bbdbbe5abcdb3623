"""DPM-Solver-v3 (NeurIPS 2023, arXiv:2310.13268): a multistep solver in coordinates in which this model changes least.

Theirs: noise schedule and solver. Ours, after the paper, as their repository has only finished files: the statistics l, s
and b. At each of many log-SNR, l is the mean of σ times the diagonal of the noise's Jacobian, estimated with a random
sign for each number; s and b are the linear fit of how f = (σε − l·x)/α changes along the trajectory to f itself. Both
take a Jacobian-vector product. The states are those of the guided model's own trajectories, one for each latent.

The recipe for guidance (second order, uniform time) with their corrector of pseudo order, and the same on EDM's σ: the
best of the twelve at 5 and at 8 evaluations. With the 120 log-SNR of their latent recipe on 128 latents (theirs: 1,024).
The statistics serve every number of steps.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import MICRO_BATCH, Bench
from torch import Tensor
from tqdm import tqdm

from .bridge import Method, Outcome, VariancePreserving, checkout, on_cpu, on_test_latents, quiet

COST = 5
"""Evaluations at every state: the slope, and two Jacobian-vector products, each with an evaluation of its own."""


@dataclass(frozen=True)
class DpmSolverV3:
    """Their options."""

    spacing: str
    corrector: bool = True
    order: int = 2
    intervals: int = 120
    latents: int = 128

    def __str__(self) -> str:
        corrector = "with" if self.corrector else "without"
        return f"order {self.order}, {self.spacing}, {corrector} corrector, {self.intervals} statistics; one fit for all"


def dpm_solver_v3(bench: Bench, steps: int, folder: Path, variant: DpmSolverV3) -> Outcome:
    """Measure one variant with so many steps."""
    model = VariancePreserving(bench.model, bench.cfg)
    found = statistics(bench, variant.intervals, variant.latents)
    with checkout(folder) as load, tempfile.TemporaryDirectory() as kept, on_cpu(), quiet():
        np.savez(f"{kept}/l.npz", l=found[0].numpy())
        np.savez(f"{kept}/sb.npz", s=found[1].numpy(), b=found[2].numpy())
        module = load("dpm_solver_v3")
        schedule = module.NoiseScheduleVP("discrete", alphas_cumprod=model.alphas_cumprod.float())
        solver = module.DPM_Solver_v3(kept, schedule, steps=steps, skip_type=variant.spacing, device="cpu")

        def sample(x: Tensor, labels: Tensor) -> Tensor:
            def noise(x: Tensor, time: Tensor) -> Tensor:
                return model.noise(x.float(), (-schedule.marginal_lambda(time[:1])).exp(), labels)

            ends = solver.sample(
                model.initial(x), noise, order=variant.order, p_pseudo=False, use_corrector=variant.corrector,
                c_pseudo=True, lower_order_final=True,
            )  # fmt: skip
            return model.final(ends).float()

        states, per_latent = on_test_latents(bench, model.net, sample)
    fitting = COST * variant.latents * (variant.intervals + 1)
    return Outcome("DPM-Solver-v3", str(variant), variant.latents, fitting, states, per_latent)


@functools.cache
def statistics(bench: Bench, intervals: int, latents: int) -> Tensor:
    """l, s and b at log-SNR in equal intervals, [3, intervals + 1, C, H, W]."""
    schedule = bench.model.noise_schedule
    lambdas = torch.linspace(-np.log(schedule.sigma_max), -np.log(schedule.sigma_min), intervals + 1)
    seen = along_trajectories(bench, lambdas, latents)
    x, noise, change, diagonal = (torch.cat(parts, 1) for parts in zip(*seen, strict=True))
    l = diagonal.mean(1)  # noqa: E741
    (slope,) = torch.gradient(l, spacing=(lambdas,), dim=0)
    sigma = (-lambdas).exp().reshape(-1, 1, 1, 1, 1)
    l, slope = l[:, None], slope[:, None]  # noqa: E741
    f = sigma * noise - l * x
    f_change = sigma * ((l - 1) * noise + change) - slope * x
    s = ((f * f_change).mean(1) - f.mean(1) * f_change.mean(1)) / f.var(1, correction=0)
    return torch.stack([l[:, 0], s, f_change.mean(1) - s * f.mean(1)])


def along_trajectories(bench: Bench, lambdas: Tensor, latents: int) -> list[tuple[Tensor, ...]]:
    """For every few latents [λ, B, C, H, W] of states, noises, the noises' change with λ and σ · diagonals."""
    (group,) = bench.fit_latents(latents).groups
    denoise = bench.model.denoiser(bench.cfg)
    signs = torch.Generator().manual_seed(0)
    found = []
    for part in tqdm(torch.arange(latents).split(MICRO_BATCH), desc="statistics", leave=False, disable=None):
        x, labels, seen = group.x[part], group.extra_args(part)["labels"], []

        def noise(x: Tensor, log_snr: Tensor, labels: Tensor = labels) -> Tensor:
            sigma = (-log_snr).exp()
            return (x - denoise(x, sigma.expand(len(x)), labels=labels)) / sigma

        for now, after in zip(lambdas, [*lambdas[1:], lambdas[-1]], strict=True):
            sigma = (-now).exp()
            sign = torch.randint(0, 2, x.shape, generator=signs) * 2.0 - 1
            with torch.no_grad():
                given = noise(x, now)
                _, change = torch.func.jvp(noise, (x, now), (-sigma * given, torch.ones(())))
                _, along = torch.func.jvp(noise, (x, now), (sign, torch.zeros(())))
            seen.append((x, given, change, sigma * sign * along))
            x = x + ((-after).exp() - sigma) * given
        found.append(tuple(torch.stack(parts) for parts in zip(*seen, strict=True)))
    return found


METHOD = Method(dpm_solver_v3, (DpmSolverV3("time_uniform"), DpmSolverV3("edm")), "thu-ml/DPM-Solver-v3")
