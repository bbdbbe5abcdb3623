"""Two experts, one for much noise and one for little, as Wan 2.2 has them: what the help page says to do works."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import Latent, Subject, rms, small, stock_node

pytestmark = pytest.mark.comfyui

STEPS, FIRST = 6, 3
"""Steps in all, and those of the high-noise model."""
CFG, SEED = 2.0, 7
SCHEDULER = "simple"


def sigmas_of(subject: Subject, steps: int) -> Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(subject.model.get_model_object("model_sampling"), SCHEDULER, steps)


def expert(dode: Pack, *, high: bool) -> Subject:
    """A flow model, which is wrong on the other side of the σ where the experts change."""
    subject = small("flow", 8)
    change = float(sigmas_of(subject, STEPS)[FIRST]) * 1.001
    network = subject.model.model
    evaluate = network._apply_model

    def biased(x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        denoised = evaluate(x, sigma, *args, **kwargs)
        if bool((sigma >= change).all()) == high:
            return denoised
        return 0.75 * denoised + 0.25 * denoised.mean((2, 3), keepdim=True) + 0.1 * x.sign()

    network._apply_model = biased
    return subject


def advanced(subject: Subject, latent: Latent, *, start: int, end: int) -> Latent:
    """KSampler (Advanced), as the templates for Wan 2.2 chain two of them."""
    import nodes

    first = start == 0
    return nodes.KSamplerAdvanced().sample(
        subject.model, "enable" if first else "disable", SEED, STEPS, CFG, "euler", SCHEDULER, subject.positive,
        subject.negative, latent, start, end, "enable" if first else "disable",
    )[0]  # fmt: skip


def chained(high: Subject, low: Subject) -> Tensor:
    """The high-noise model's steps, then the low-noise model's."""
    begun = advanced(high, {"samples": torch.zeros(4, 4, 8, 8)}, start=0, end=FIRST)
    return advanced(low, begun, start=FIRST, end=10000)["samples"]


def by_custom_samplers(dode: Pack, experts: list[tuple[Subject, Any]]) -> Tensor:
    """The same by SamplerCustom, D-ODE sampler and SplitSigmas."""
    (_, first), _ = experts
    sigmas = dode.run("DODE_Sigmas", table=first, steps=STEPS, denoise=1.0, solver="any")["sigmas"]
    latent: Latent = {"samples": torch.zeros(4, 4, 8, 8)}
    for begins, (subject, table), part in zip(
        (True, False), experts, (sigmas[: FIRST + 1], sigmas[FIRST:]), strict=True
    ):
        latent = stock_node(
            "nodes_custom_sampler", "SamplerCustom", model=subject.model, add_noise=begins, noise_seed=SEED,
            cfg=CFG, positive=subject.positive, negative=subject.negative, sigmas=part, latent_image=latent,
            sampler=dode.run("DODE_Sampler", table=table, solver="any")["sampler"],
        )  # fmt: skip
    return latent["samples"]


def test_a_table_for_each_expert_over_all_steps(dode, said):
    high, low = expert(dode, high=True), expert(dode, high=False)
    tables = [
        dode.distil(subject, scheduler=SCHEDULER, steps=str(STEPS), latents=8, save_name=name)["table"]
        for subject, name in ((high, "high"), (low, "low"))
    ]
    with_lambda = [
        replace(subject, model=dode.apply(subject.model, table))
        for subject, table in zip((high, low), tables, strict=True)
    ]
    by_model = chained(*with_lambda)
    assert not said()
    assert rms(by_model, by_custom_samplers(dode, list(zip((high, low), tables, strict=True)))) < 1e-4

    whole = small("flow", 8)
    converged = stock_node(
        "nodes_custom_sampler", "SamplerCustom", model=whole.model, add_noise=True, noise_seed=SEED, cfg=CFG,
        positive=whole.positive, negative=whole.negative, latent_image={"samples": torch.zeros(4, 4, 8, 8)},
        sampler=stock_node("nodes_custom_sampler", "KSamplerSelect", sampler_name="dpmpp_2m"),
        sigmas=sigmas_of(whole, 100),
    )["samples"]  # fmt: skip
    assert rms(by_model, converged) < 0.6 * rms(chained(high, low), converged)
