"""DyWeight (arXiv:2603.11607): weights over earlier outputs and a scale of every σ, fitted end to end by backpropagation.

Theirs: predictor, loss, teacher and sampler. The recipe for latent models (discrete schedule, three outputs), but with
its l2 loss, the rate of its CIFAR recipe, and without its free first step, which did worse here in both pairs tried:
the best of eight variants at 5 evaluations. It is fitted to a teacher that ends at σ = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Bench
from torch import Tensor, nn

from .bridge import BUDGET, DISCRETE, Method, Net, Outcome, batches, checkout, images_within, on_test_latents


@dataclass(frozen=True)
class DyWeight:
    """Their options. AFS: the first step goes along x / √(1 + σ²), without an evaluation."""

    afs: bool
    history: int | None
    lr: float
    schedule: dict[str, Any]
    batch: int = 16
    images: int = 10_000
    teacher_steps: int = 35

    def __str__(self) -> str:
        history = "all outputs" if self.history is None else f"{self.history} outputs"
        afs = "AFS, " if self.afs else ""
        return f"{afs}{history}, {self.schedule['schedule_type']}, lr {self.lr:g}, batch {self.batch}"


def dyweight(bench: Bench, steps: int, folder: Path, variant: DyWeight) -> Outcome:
    """Fit and measure one variant."""
    net = Net(bench.model, bench.cfg)
    solver = {
        "num_steps": steps + 2 if variant.afs else steps + 1, "sampler_stu": "dyweight", "sampler_tea": "ipndm",
        "teacher_steps": variant.teacher_steps, "afs": variant.afs, "max_order": 4, **variant.schedule,
    }  # fmt: skip
    with checkout(folder) as load:
        torch.manual_seed(0)
        predictor = load("training.networks").DyWeight_predictor(max_history_steps=variant.history, **solver)
        loss = load("training.loss").DyWeight_loss(
            sigma_min=net.sigma_min, sigma_max=net.sigma_max, loss_type="l2", **solver
        )
        images = images_within(BUDGET, variant.teacher_steps + 3 * steps, variant.images, variant.batch)

        def student(x: Tensor, labels: Tensor) -> Tensor:
            weights, t_scale = predictor()
            return loss.get_student_final_output(
                net=net,
                tensor_in=x,
                labels=labels,
                hybrid_weights=weights,
                t_scale=t_scale,
                use_afs=variant.afs,
            )

        def teacher(x: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                return loss.get_final_teacher_output(net=net, tensor_in=x, labels=labels)

        optimizer, scheduler = _dyweight_optimizer(predictor, variant.lr, images // variant.batch)
        for x, labels in batches(bench, images, variant.batch):
            optimizer.zero_grad()
            loss.compute_loss(student(x, labels), teacher(x, labels)).backward()
            nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        fitting = net.evaluations
        states, per_latent = on_test_latents(bench, net, student)
    return Outcome("DyWeight", str(variant), images, fitting, states, per_latent)


def _dyweight_optimizer(
    predictor: nn.Module, lr: float, updates: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam; a tenth of the updates warms up, then a cosine down to a hundredth."""
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr)
    warmup = updates // 10
    rates = torch.optim.lr_scheduler
    up = rates.LinearLR(optimizer, start_factor=0.1, total_iters=warmup)
    down = rates.CosineAnnealingLR(optimizer, T_max=updates - warmup, eta_min=lr / 100)
    return optimizer, rates.SequentialLR(optimizer, [up, down], milestones=[warmup])


METHOD = Method(
    dyweight,
    (DyWeight(afs=False, history=3, lr=3e-2, schedule=DISCRETE),),
    "Westlake-AGI-Lab/DyWeight",
)
