"""ConsistencySolver (CVPR 2026, arXiv:2512.13592): PPO teaches a small network the coefficients of a multistep rule.

The rule mixes the last four outputs with weights of sum 1 that depend on where a step begins and ends; one rule serves
every number of steps. It keeps drawing its coefficients at random, which is what their sampler does.

Theirs: the scheduler with its timesteps, and the network. Ours: the loop of PPO, which in their script is one with Stable
Diffusion (same optimiser, batch, clipping, entropy, advantages; 2 to 15 steps at random; finished pictures of 2,000
noises). The reward is theirs of PSNR, on latents, as the error is measured on them; theirs of depth needs pictures. For
600 updates instead of 3,001, with ten times the rate, which was better after 250 of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Bench
from torch import Tensor, nn
from tqdm import tqdm

from .bridge import FINE, Method, Outcome, VariancePreserving, checkout, finished, on_test_latents, quiet

STEPS = (2, 16)
"""Of a rollout: at least the first, fewer than the second."""


@dataclass(frozen=True)
class ConsistencySolver:
    """Their options."""

    updates: int = 600
    lr: float = 1e-3
    order: int = 4
    actions: int = 11
    batch: int = 80
    images: int = 2_000
    clip: float = 0.2
    entropy: float = 0.01

    def __str__(self) -> str:
        return f"order {self.order}, {self.updates} updates of batch {self.batch}, lr {self.lr:g}, PSNR; one fit for all"


@dataclass(frozen=True)
class Rollout:
    """A batch of drawn samplings.

    Attributes:
        ends: where they ended, [B, C, H, W].
        states, actions, chances, used: of every draw, [B, steps − 1, …]; used is 0 for weights over outputs that
            there are not yet.
    """

    ends: Tensor
    states: Tensor
    actions: Tensor
    chances: Tensor
    used: Tensor


def consistency_solver(bench: Bench, steps: int, folder: Path, variant: ConsistencySolver) -> Outcome:
    """Measure the rule with so many steps."""
    model = VariancePreserving(bench.model, bench.cfg)
    scheduler, fitting = fitted(bench, folder, variant)
    with quiet():
        torch.manual_seed(0)
        states, per_latent = on_test_latents(
            bench,
            model.net,
            lambda x, labels: model.final(rolled_out(scheduler, model, model.initial(x), labels, steps).ends),
        )
    return Outcome("ConsistencySolver", str(variant), variant.images, fitting, states, per_latent)


@functools.cache
def fitted(bench: Bench, folder: Path, variant: ConsistencySolver) -> tuple[Any, int]:
    """The trained scheduler, and the evaluations that it cost."""
    model = VariancePreserving(bench.model, bench.cfg)
    torch.manual_seed(0)
    with checkout(folder, "factor_net_ppo_continous") as load, quiet():
        alphas = model.alphas_cumprod
        scheduler = load("scheduler_ppo").PPOScheduler(
            trained_betas=(1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])).tolist(),
            timestep_spacing="trailing",
            order_dim=variant.order,
            scaler_dim=0,
            factor_net_kwargs={"num_actions": variant.actions},
        )
        network = scheduler.factor_net
        optimizer = torch.optim.AdamW(network.parameters(), lr=variant.lr, weight_decay=1e-3)
        for x, labels, targets, steps in rollouts_wanted(bench, variant):
            with torch.no_grad():
                rollout = rolled_out(scheduler, model, model.initial(x), labels, steps)
            loss = policy_loss(network, rollout, model.final(rollout.ends), targets, variant)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    return scheduler, model.net.evaluations + variant.images * FINE


def rollouts_wanted(bench: Bench, variant: ConsistencySolver) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """For every update latents, labels, where the teacher ends, and a number of steps."""
    x, labels, targets = finished(bench, variant.images)
    counts = torch.randint(*STEPS, (variant.updates,), generator=torch.Generator().manual_seed(0))
    for update, steps in enumerate(tqdm(counts.tolist(), desc="updates", leave=False, disable=None)):
        part = torch.arange(update * variant.batch, (update + 1) * variant.batch) % variant.images
        yield x[part], labels[part], targets[part], steps


def rolled_out(scheduler: Any, model: VariancePreserving, x: Tensor, labels: Tensor, steps: int) -> Rollout:
    """Sampling with drawn coefficients; the first step has nothing to draw."""
    scheduler.set_timesteps(steps)
    draws = []
    for timestep in scheduler.timesteps:
        sigma = model.net.demo.sigmas[timestep]
        noise = model.noise(x, sigma, labels)
        x, actions, chances, given, used = scheduler.step(noise, int(timestep), x, return_dict=False)
        draws.append((given["x"], actions, chances, used))
    return Rollout(x, *(torch.stack(parts, 1) for parts in zip(*draws[1:], strict=True)))


def policy_loss(
    network: nn.Module, rollout: Rollout, ends: Tensor, targets: Tensor, variant: ConsistencySolver
) -> Tensor:
    """Their clipped policy loss with the PSNR as the reward of every draw."""
    rewards = -(ends - targets).square().flatten(1).mean(1).log10()
    advantages = 10 * (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    draws = rollout.actions.shape[1]
    weighted = advantages.repeat_interleave(draws)[:, None] * rollout.used.flatten(0, 1)
    now, entropy = network({"x": rollout.states.flatten(0, 1)}, rollout.actions.flatten(0, 1))
    before = rollout.chances.flatten(0, 1)
    ratio = ((now + 1e-9).log().sum(1) - (before + 1e-9).log().sum(1)).exp()[:, None]
    clipped = ratio.clamp(1 - variant.clip, 1 + variant.clip)
    gain = torch.minimum(weighted * ratio, weighted * clipped).mean()
    return -gain - variant.entropy * entropy.mean()


METHOD = Method(consistency_solver, (ConsistencySolver(),), "G-U-N/consolver")
