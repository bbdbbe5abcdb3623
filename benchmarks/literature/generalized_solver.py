"""GS (ICLR 2026, arXiv:2510.17699): corrections to a multistep solver's coefficients, and its σ, by backpropagation.

Theirs: noise schedule, solver, and the wrapper with its parameters and loss. The Stable Diffusion recipe of GS with five
times its rate, which was better after 500 updates, with the squared distance of latents for the absolute one, and with
finished pictures from the teacher of all our runs. GAS, which adds a discriminator, was not run: it does not aim at the
distance that is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import Bench
from torch import Tensor, nn
from tqdm import trange

from .bridge import FINE, Method, Outcome, VariancePreserving, checkout, finished, on_test_latents, quiet

NOT_NEEDED = (
    "lpips",
    "torch_ema",
    "ml_collections",
    "src.gas.base_model",
    "src.gas.adversarial_module.dist_adv_loss",
)


@dataclass(frozen=True)
class GeneralizedSolver:
    """Their options."""

    lr: float = 5e-3
    batch: int = 4
    updates: int = 2_000
    images: int = 1_400
    decay: float = 0.999

    def __str__(self) -> str:
        return f"all outputs and states, lr {self.lr:g}, {self.updates} updates of batch {self.batch}, l2"


class Base:
    """Our model as their wrapper has one."""

    t_eps = 1e-3

    def __init__(self, model: VariancePreserving, schedule: Any) -> None:
        self.ns = schedule
        self._model = model
        self._labels: Tensor | None = None

    def set_condition(self, labels: Tensor) -> None:
        """What the next evaluations are asked for."""
        self._labels = labels

    def model_fn(self, x: Tensor, time: Tensor) -> Tensor:
        """The noise."""
        return self._model.noise(x, (-self.ns.marginal_lambda(time)).exp(), self._labels)


def generalized_solver(bench: Bench, steps: int, folder: Path, variant: GeneralizedSolver) -> Outcome:
    """Fit and measure one variant."""
    model = VariancePreserving(bench.model, bench.cfg)
    with checkout(folder, *NOT_NEEDED) as load, quiet():
        torch.manual_seed(0)
        alphas = model.alphas_cumprod.float()
        schedule = load("src.gas.solver_utils").NoiseScheduleVP("discrete", alphas_cumprod=alphas)
        options = SimpleNamespace(
            steps=steps, order=steps, t_parametrization="mu_logit", use_theory_coef=True,
            loss_config=SimpleNamespace(loss_type="GS", loss_key="loss_l2_latents", disc_weight=1),
        )  # fmt: skip
        wrapper = load("src.gas.gs_wrapper").GSWrapperLatent(Base(model, schedule), options)
        train(bench, model, wrapper, variant)
        fitting = model.net.evaluations + FINE * variant.images
        states, per_latent = on_test_latents(
            bench,
            model.net,
            lambda x, labels: model.final(wrapper.student_sampler_fn(model.initial(x), condition=labels)[0]),
        )
    return Outcome("GS", str(variant), variant.images, fitting, states, per_latent)


def train(bench: Bench, model: VariancePreserving, wrapper: Any, variant: GeneralizedSolver) -> None:
    """Their loop; leaves the parameters' moving average."""
    x, labels, targets = finished(bench, variant.images)
    parameters = wrapper.parameters()
    optimizer = torch.optim.Adam(parameters, lr=variant.lr)
    average = [parameter.detach().clone() for parameter in parameters]
    for update in trange(variant.updates, desc="updates", leave=False, disable=None):
        part = torch.randperm(variant.images)[: variant.batch]
        ends = targets[part] / model.final(torch.ones(()))
        wrapper((model.initial(x[part]), ends, ends, labels[part]))["loss_total"].mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # torch_ema's: at first the average is short
            torch._foreach_lerp_(average, parameters, 1 - min(variant.decay, (update + 2) / (update + 11)))
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


METHOD = Method(generalized_solver, (GeneralizedSolver(),), "3145tttt/GAS")
