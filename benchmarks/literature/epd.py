"""EPD (ICCV 2025, arXiv:2507.14797): a step follows a mix of slopes at learned σ, evaluated side by side.

Theirs: predictor, samplers and teachers. The CIFAR recipe (updates by the last state alone, which is what their loop does
below six steps), with the squared distance instead of a distance of Inception's features, and with the batch of the
Stable Diffusion recipe, for 100 updates (theirs make 79). A step with two points takes three evaluations, one less
where the first is free, and these count although they could run side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Epd:
    """Their options. `solver` epd is the method by itself, ipndm the plug-in."""

    solver: str
    schedule: dict[str, Any]
    scale_dir: float = 0.05
    scale_time: float = 0.05
    points: int = 2
    lr: float = 0.2
    between: int = 3
    batch: int = 32
    images: int = 3_200

    @property
    def teacher(self) -> tuple[str, int]:
        """What is followed, and evaluations of each of its steps: of DPM-Solver-2 they take two for one."""
        return ("dpm", 4) if self.solver == "epd" else (self.solver, 1)

    def steps(self, evaluations: int) -> tuple[int, bool]:
        """How many, and whether the first is free of its first evaluation."""
        steps, left = divmod(evaluations, self.points + 1)
        if left not in (0, self.points):
            raise NotPossible
        return steps + (left > 0), left > 0

    def __str__(self) -> str:
        return (
            f"{self.points} points, {self.schedule['schedule_type']}, scale_dir {self.scale_dir:g}, "
            f"scale_time {self.scale_time:g}, lr {self.lr:g}, batch {self.batch}"
        )


def epd(bench: Bench, steps: int, folder: Path, variant: Epd) -> Outcome:
    """Fit and measure one variant."""
    net = GuidedNet(bench.model, bench.cfg)
    count, afs = variant.steps(steps)
    followed, cost = variant.teacher
    fine = (variant.between + 1) * count
    ends = {"sigma_min": net.sigma_min, "sigma_max": net.sigma_max, **variant.schedule}
    solver = {
        "num_steps": count + 1, "sampler_stu": variant.solver, "sampler_tea": followed, "afs": afs,
        "scale_dir": variant.scale_dir, "scale_time": variant.scale_time, **ends,
    }  # fmt: skip
    images = images_within(BUDGET, fine * cost + 3 * steps, variant.images, variant.batch)
    with checkout(folder) as load, quiet():
        torch.manual_seed(0)
        solvers = load("solvers")
        predictor = load("training.networks").EPD_predictor(num_points=variant.points, **solver)

        def student(x: Tensor, labels: Tensor) -> Tensor:
            sampler = getattr(solvers, f"{variant.solver}_sampler")
            return sampler(net, x / net.sigma_max, condition=labels, predictor=predictor, **solver)[0]

        def teacher(x: Tensor, labels: Tensor) -> Tensor:
            sampler = getattr(solvers, f"{followed}_sampler")
            with torch.no_grad():
                return sampler(net, x / net.sigma_max, condition=labels, num_steps=fine + 1, **ends)[0]

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
    return Outcome(
        "EPD" if variant.solver == "epd" else "EPD-Plugin", str(variant), images, fitting, states, per_latent
    )


METHOD = Method(epd, (Epd("epd", TIME_UNIFORM),), "BeierZhu/EPD@EPD-Solver")
