"""LD3 (ICLR 2025, arXiv:2405.15506): the σ of a stock solver, and those that the network is told, by backpropagation.

The student may end where a slightly moved start ends: starts are moved, within a bound, as the σ are fitted.

Theirs: noise schedule, solvers and the trainer. The recipe of its latent models, with its l2 loss, and with finished
pictures from the teacher of all our runs.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import Bench
from torch import Tensor

from .bridge import (
    FINE,
    Method,
    Outcome,
    VariancePreserving,
    checkout,
    finished,
    on_cpu,
    on_test_latents,
    quiet,
)

NOT_NEEDED = ("lpips", "imageio")


@dataclass(frozen=True)
class Ld3:
    """Their options.

    Attributes:
        images: to fit on; as many more decide.
    """

    solver: str
    order: int
    images: int = 50
    rounds: tuple[int, int] = (2, 3)
    lr: float = 5e-3
    lr_told: float = 1e-3

    def __str__(self) -> str:
        return f"{self.solver} order {self.order}, lr {self.lr:g}, {sum(self.rounds)} rounds, half of the images decide"


def ld3(bench: Bench, steps: int, folder: Path, variant: Ld3) -> Outcome:
    """Fit and measure one variant."""
    model = VariancePreserving(bench.model, bench.cfg)

    def noise(x: Tensor, time: Tensor, condition: Tensor, _: None) -> Tensor:
        if time[0] <= schedule.eps:
            return x  # their UniPC asks once more at the end, and does not use it
        sigma = (-schedule.marginal_lambda(time[:1])).exp()
        return model.noise(x, sigma, condition.flatten())

    with checkout(folder, *NOT_NEEDED) as load, tempfile.TemporaryDirectory() as kept, on_cpu(), quiet():
        torch.manual_seed(0)
        alphas = model.alphas_cumprod.float()
        schedule = load("noise_schedulers").NoiseScheduleVP("discrete", alphas_cumprod=alphas)
        schedule.lambda_min = schedule.marginal_lambda(schedule.T).item()
        schedule.lambda_max = schedule.marginal_lambda(schedule.eps).item()
        solver, _, _ = load("utils").get_solvers(variant.solver, steps, variant.order, schedule, "bh2")
        module, order = load("trainer"), min(variant.order, steps)
        channels, size, _ = bench.model.latent_shape
        trainer = module.LD3Trainer(
            module.ModelConfig(
                noise, lambda latents: latents, schedule, solver, variant.solver, order, steps, time_mode="time",
                prior_bound=1e-3 * channels * size**2 / steps**2, resolution=size, channels=channels,
                snapshot_path=kept,
            ),
            module.TrainingConfig(
                *data(module, bench, model, variant.images), train_batch_size=1, valid_batch_size=variant.images,
                lr_time_1=variant.lr, lr_time_2=variant.lr_told / steps, shift_lr=12 / steps, loss_type="L2",
            ),
        )  # fmt: skip
        trainer._visual_times = module.save_gif = lambda *_: None  # no pictures
        trainer.train(*variant.rounds)
        used, told = torch.load(f"{kept}/best_v2.pt")["best_t_steps"].chunk(2)
        fitting = model.net.evaluations + FINE * 2 * variant.images

        def sample(x: Tensor, labels: Tensor) -> Tensor:
            ends = solver.sample_simple(
                noise, model.initial(x), timesteps=used, timesteps2=told, order=order, condition=labels, NFEs=steps
            )  # fmt: skip
            return model.final(ends)

        states, per_latent = on_test_latents(bench, model.net, sample)
    return Outcome("LD3", str(variant), 2 * variant.images, fitting, states, per_latent)


def data(module: ModuleType, bench: Bench, model: VariancePreserving, images: int) -> list[Any]:
    """What the σ are fitted on, and what decides."""
    x, labels, targets = finished(bench, 2 * images)
    starts, ends = model.initial(x), targets / model.final(torch.ones(()))
    return [
        module.LD3Dataset(starts[part], starts[part].clone(), ends[part], labels[part, None], [None] * images)
        for part in torch.arange(2 * images).split(images)
    ]


METHOD = Method(ld3, (Ld3("uni_pc", 3),), "vinhsuhi/LD3")
