"""GITS (arXiv:2405.11326): dynamic programming chooses the student's σ among a finer teacher's.

Theirs: the search, `get_dp_list`, with its teacher and its samplers; it draws its own latents to search on. The recipe
on iPNDM, and the best solver and schedule here, with the coefficient of the recipe and the best of four at 5
evaluations; no free first step, which it did not always find room for. DPM-Solver++ predicts the noise, as in their
latent recipes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import Bench

from .bridge import POLYNOMIAL, Method, Net, Outcome, checkout, on_test_latents, quiet


@dataclass(frozen=True)
class Gits:
    """Their options. Without a search it is the stock solver on the stock schedule."""

    solver: str
    max_order: int
    schedule: dict[str, Any]
    search: bool = True
    coeff: float = 1.15
    teacher_steps: int = 61
    images: int = 256

    def __str__(self) -> str:
        coeff = f", coeff {self.coeff:g}" if self.search else ""
        return f"{self.solver} order {self.max_order}, {self.schedule['schedule_type']}{coeff}"


def gits(bench: Bench, steps: int, folder: Path, variant: Gits) -> Outcome:
    """Search (or take the stock schedule) and measure one variant."""
    net = Net(bench.model, bench.cfg)
    options = {
        "num_steps": steps + 1, "sigma_min": net.sigma_min, "sigma_max": net.sigma_max, "max_order": variant.max_order,
        "predict_x0": False, "lower_order_final": True, "afs": False, **variant.schedule,
    }  # fmt: skip
    with checkout(folder) as load, quiet():
        torch.manual_seed(0)
        module = load("gits_utils")
        chosen = _gits_search(module, net, variant, options) if variant.search else None
        fitting = net.evaluations
        t_steps = module.solver_utils.get_schedule(
            variant.teacher_steps if variant.search else steps + 1, net.sigma_min, net.sigma_max,
            device=torch.device("cpu"), net=net, dp_list=chosen, **variant.schedule,
        )  # fmt: skip
        sampler, _ = module.get_sampler_fn(variant.solver, torch.device("cpu"))
        options["num_steps"] = len(t_steps)
        states, per_latent = on_test_latents(
            bench,
            net,
            lambda x, labels: sampler(net, x / t_steps[0], class_labels=labels, t_steps=t_steps, **options),
        )
    return Outcome(
        "GITS" if variant.search else "nothing learned", str(variant), variant.images if variant.search else 0,
        fitting, states, per_latent,
    )  # fmt: skip


def _gits_search(module: ModuleType, net: Net, variant: Gits, options: dict[str, Any]) -> list[int]:
    """Their search. It draws its own latents and wants a process group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        return module.get_dp_list(
            net, torch.device("cpu"), dataset_name="demo", model_source="edm", prompt=None, metric="dev",
            num_warmup=variant.images, max_batch_size=64, num_steps_tea=variant.teacher_steps, coeff=variant.coeff,
            solver=variant.solver, solver_tea=variant.solver, deis_mode="tab", **options,
        )  # fmt: skip
    finally:
        torch.distributed.destroy_process_group()


METHOD = Method(
    gits,
    (
        Gits("ipndm", 4, POLYNOMIAL, search=False),
        Gits("ipndm", 4, POLYNOMIAL),
        Gits("dpmpp", 3, POLYNOMIAL, search=False),
        Gits("dpmpp", 3, POLYNOMIAL),
        Gits("dpmpp", 3, POLYNOMIAL, coeff=1.0),
    ),
    "zju-pi/diff-sampler",
    "gits-main",
)
