"""EPD (ICCV 2025, arXiv:2507.14797): a step follows a mix of slopes at learned σ, evaluated side by side.

Theirs: predictor, sampler and teacher. The ImageNet recipe (updates by the last state alone, which is what their loop
does below six steps) with two points and with one, with the squared distance instead of a distance of Inception's
features, and with the batch of the Stable Diffusion recipe for the 79 updates of the CIFAR recipe. A step with two
points takes three evaluations, one less where the first is free, and these count although they could run side by side.
Their plug-in for iPNDM did worse here at 5 evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from common import Bench
from torch import Tensor

from .bridge import (
    BUDGET,
    TIME_UNIFORM,
    GuidedNet,
    Method,
    NotPossible,
    Outcome,
    batches,
    checkout,
    images_within,
    on_test_latents,
    quiet,
)

DPM_COST = 4
"""Evaluations of each of the teacher's steps: DPM-Solver-2, each of them cut in two."""


@dataclass(frozen=True)
class Epd:
    """Their options."""

    points: int
    scale_dir: float = 0.05
    scale_time: float = 0.05
    lr: float = 0.2
    between: int = 1
    batch: int = 32
    images: int = 79 * 32

    def steps(self, evaluations: int) -> tuple[int, bool]:
        """How many, and whether the first is free of its first evaluation."""
        steps, left = divmod(evaluations, self.points + 1)
        if left not in (0, self.points):
            raise NotPossible
        return steps + (left > 0), left > 0

    def __str__(self) -> str:
        return (
            f"points {self.points}, time_uniform, scale_dir {self.scale_dir:g}, "
            f"scale_time {self.scale_time:g}, lr {self.lr:g}, batch {self.batch}"
        )


def epd(bench: Bench, steps: int, folder: Path, variant: Epd) -> Outcome:
    """Fit and measure one variant."""
    net = GuidedNet(bench.model, bench.cfg)
    count, afs = variant.steps(steps)
    fine = (variant.between + 1) * count
    ends = {"sigma_min": net.sigma_min, "sigma_max": net.sigma_max, **TIME_UNIFORM}
    solver = {
        "num_steps": count + 1, "sampler_stu": "epd", "sampler_tea": "dpm", "afs": afs,
        "scale_dir": variant.scale_dir, "scale_time": variant.scale_time, **ends,
    }  # fmt: skip
    images = images_within(BUDGET, fine * DPM_COST + 3 * steps, variant.images, variant.batch)
    with checkout(folder) as load, quiet():
        torch.manual_seed(0)
        solvers = load("solvers")
        predictor = load("training.networks").EPD_predictor(num_points=variant.points, **solver)

        def student(x: Tensor, labels: Tensor) -> Tensor:
            return solvers.epd_sampler(
                net, x / net.sigma_max, condition=labels, predictor=predictor, **solver
            )[0]

        def teacher(x: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                return solvers.dpm_sampler(
                    net, x / net.sigma_max, condition=labels, num_steps=fine + 1, **ends
                )[0]

        optimizer = torch.optim.Adam(predictor.parameters(), lr=variant.lr)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, images // variant.batch + 1, eta_min=0.01
        )
        for x, labels in batches(bench, images, variant.batch):
            optimizer.zero_grad()
            ((student(x, labels) - teacher(x, labels)).square().sum() / len(x)).backward()
            optimizer.step()
            rates.step()
        fitting = net.evaluations
        states, per_latent = on_test_latents(bench, net, student)
    return Outcome("EPD", str(variant), images, fitting, states, per_latent)


METHOD = Method(epd, (Epd(points=2), Epd(points=1)), "BeierZhu/EPD@EPD-Solver")
