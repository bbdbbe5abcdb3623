"""AMED (arXiv:2312.00094): a network reads the U-Net's bottleneck and places an intermediate step, fitted step by step.

Theirs: predictor, losses, teachers and samplers. The predictor reads an 8×8 bottleneck: it gets our 4×4 one, each value
four times. AMED-Solver, and AMED-Plugin on iPNDM: the CIFAR recipes; on DPM-Solver++ the same on its best schedule
here, predicting the noise, as in their latent recipes: their data prediction clips as if for pixels. With the batch of
its Stable Diffusion recipe, for 100 updates of every step (theirs make 78 and 156), and with a free first step where
the number of evaluations is odd, as two evaluations make a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Bench
from torch import Tensor, nn

from .bridge import (
    BUDGET,
    POLYNOMIAL,
    TIME_UNIFORM,
    GuidedNet,
    Method,
    Net,
    Outcome,
    batches,
    checkout,
    images_within,
    on_test_latents,
    quiet,
)


@dataclass(frozen=True)
class Amed:
    """Their options. `scale_dir` and `scale_time` bound what is learned beside the intermediate σ."""

    name: str
    solver: str
    max_order: int
    schedule: dict[str, Any]
    scale_dir: float = 0.01
    scale_time: float = 0.2
    batch: int = 32
    images: int = 3_200
    lr: float = 5e-3

    @property
    def single_step(self) -> bool:
        """AMED-Solver: Heun teaches, and every step is fitted from the teacher's state."""
        return self.solver == "amed"

    def __str__(self) -> str:
        base = "" if self.single_step else f"{self.solver} order {self.max_order}, "
        return (
            f"{base}{self.schedule['schedule_type']}, scale_dir {self.scale_dir:g}, "
            f"scale_time {self.scale_time:g}, lr {self.lr:g}, batch {self.batch}"
        )


def amed(bench: Bench, steps: int, folder: Path, variant: Amed) -> Outcome:
    """Fit and measure one variant. An odd number of evaluations needs AFS, as two make a step."""
    net = GuidedNet(bench.model, bench.cfg)
    pairs = (steps + 1) // 2
    teacher, between, per_step = ("heun", 1, 2) if variant.single_step else (variant.solver, 2, 1)
    solver = {
        "num_steps": pairs + 1, "sampler_stu": variant.solver, "sampler_tea": teacher, "M": between,
        "afs": steps % 2 == 1, "max_order": variant.max_order, "predict_x0": False, **variant.schedule,
    }  # fmt: skip
    with checkout(folder) as load, quiet(), net.bottleneck():
        torch.manual_seed(0)
        predictor = load("training.networks").AMED_predictor(
            img_resolution=net.img_resolution,
            scale_dir=variant.scale_dir,
            scale_time=variant.scale_time,
            **solver,
        )
        loss = load("training.loss").AMED_loss(sigma_min=net.sigma_min, sigma_max=net.sigma_max, **solver)
        cost = pairs * ((between + 1) * per_step + 4)
        images = images_within(BUDGET, cost, variant.images, variant.batch)
        optimizer = torch.optim.Adam(predictor.parameters(), lr=variant.lr)
        wrapped = nn.DataParallel(predictor)  # only for the .module that their DPM-Solver++ asks for
        for x, labels in batches(bench, images, variant.batch):
            _amed_updates(variant, loss, wrapped, optimizer, net, x, labels)
        fitting = net.evaluations

        def sample(x: Tensor, labels: Tensor) -> Tensor:
            return loss.solver_stu(
                net, x / loss.t_steps[0], condition=labels, AMED_predictor=predictor, sigma_min=net.sigma_min,
                sigma_max=net.sigma_max, **solver,
            )  # fmt: skip

        states, per_latent = on_test_latents(bench, net, sample)
    return Outcome(variant.name, str(variant), images, fitting, states, per_latent)


def _amed_updates(
    variant: Amed,
    loss: Any,
    predictor: nn.Module,
    optimizer: torch.optim.Optimizer,
    net: Net,
    x: Tensor,
    labels: Tensor,
) -> None:
    """One update at every step of the batch's trajectory."""
    with torch.no_grad():
        teacher = loss.get_teacher_traj(net=net, tensor_in=x, condition=labels)
    for step in range(loss.num_steps - 1):
        optimizer.zero_grad()
        squares, ended = loss(
            AMED_predictor=predictor,
            net=net,
            tensor_in=x,
            condition=labels,
            step_idx=step,
            teacher_out=teacher[step],
        )
        (squares.sum() / len(x)).backward()
        for parameter in predictor.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
        optimizer.step()
        x = teacher[step] if variant.single_step else ended


METHOD = Method(
    amed,
    (
        Amed("AMED-Plugin", "ipndm", 4, POLYNOMIAL),
        Amed("AMED-Plugin", "dpmpp", 3, POLYNOMIAL),
        Amed("AMED-Solver", "amed", 4, TIME_UNIFORM, scale_time=0.0),
    ),
    "zju-pi/diff-sampler",
    "amed-solver-main",
)
