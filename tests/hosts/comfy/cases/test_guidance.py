"""Models and guiders that do more than guidance: caches, guidance with a memory, several scales."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import Subject, rms, small, stock_node, unet

pytestmark = pytest.mark.comfyui

A_PROBE = 12
"""Evaluations that finding out may take: one state asked twice, another in between."""


def lazy_cache(model: Any, start: float = 0.0) -> Any:
    return stock_node(
        "nodes_easycache", "LazyCacheNode", model=model, reuse_threshold=0.2, start_percent=start,
        end_percent=0.95, verbose=False,
    )  # fmt: skip


def lazy_cache_later(model: Any) -> Any:
    """As the node has it at first."""
    return lazy_cache(model, 0.15)


def easy_cache(model: Any) -> Any:
    return stock_node(
        "nodes_easycache", "EasyCacheNode", model=model, reuse_threshold=0.2, start_percent=0.0,
        end_percent=0.95, verbose=False,
    )  # fmt: skip


def refusal(dode: Pack, subject: Subject, **changes: Any) -> str:
    """The error of a distillation that must be refused before the teacher."""
    with pytest.raises(dode.library.DodeError) as raised:
        dode.distil(subject, **changes)
    assert len(subject.calls) <= A_PROBE
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "cache", "micro_batch"),
    [
        ("eps", lazy_cache, 0),
        ("flow", lazy_cache, 1),
        ("eps", lazy_cache_later, 1),
        ("flow", lazy_cache_later, 0),
    ],
)
def test_a_cache_is_refused_by_name(kind, cache, micro_batch, dode):
    subject = small(kind)
    subject = replace(subject, model=cache(subject.model))
    assert "LazyCache" in refusal(dode, subject, micro_batch=micro_batch)


def test_a_cache_inside_the_network_is_refused_by_name(dode):
    subject = unet()
    subject = replace(subject, model=easy_cache(subject.model))
    assert "EasyCache" in refusal(dode, subject, latents=2, scale=4)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_a_cache_is_no_hindrance_to_sampling_with_a_table(kind, dode):
    subject = dode.demo(kind)
    subject = replace(subject, model=lazy_cache_later(subject.model))
    sampled = dode.ksampler(subject, dode.shipped(kind), steps=8)["samples"]
    assert sampled.isfinite().all()
    assert len(subject.calls) < 8


def with_momentum(model: Any) -> Any:
    """Guidance that remembers the step before."""
    return stock_node("nodes_apg", "APG", model=model, eta=1.0, norm_threshold=5.0, momentum=-0.5)


def mahiro(model: Any) -> Any:
    """Guidance of which all of a batch get the mean."""
    return stock_node("nodes_mahiro", "Mahiro", model=model)


def by_the_largest_of_the_batch(model: Any) -> Any:
    """As dynamic thresholding is often written: one threshold for the batch."""

    def thresholded(arguments: dict[str, Any]) -> Any:
        denoised = arguments["denoised"]
        largest = denoised.abs().quantile(0.9)
        return denoised.clamp(-largest, largest)

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(thresholded)
    return patched


@pytest.mark.parametrize(
    ("patch", "micro_batch"),
    [(with_momentum, 0), (with_momentum, 1), (mahiro, 0), (mahiro, 2), (by_the_largest_of_the_batch, 0)],
)
def test_guidance_that_remembers_or_couples_is_said_or_refused(patch, micro_batch, dode, said):
    subject = small()
    subject = replace(subject, model=patch(subject.model))
    try:
        dode.distil(subject, latents=4, steps="4", micro_batch=micro_batch)
    except dode.library.DodeError as error:
        assert len(subject.calls) <= A_PROBE
        told = str(error)
    else:
        told = said()
    assert re.search("guidance|model|patch|micro_batch|batch", told)


def test_weights_in_fp8_hide_no_memory(dode):
    """The network computes in another format than they are in."""
    subject = unet(weights=torch.float8_e4m3fn)
    assert subject.model.model_dtype() == torch.float8_e4m3fn
    dode.distil(subject, latents=2, steps="2", scale=2)
    subject.calls.clear()
    subject = replace(subject, model=with_momentum(subject.model))
    assert "momentum" in refusal(dode, subject, latents=2, steps="2", scale=2)


def test_plain_guidance_is_neither_said_nor_refused(dode, said):
    little = {"latents": 4, "steps": "4", "scale": 2, "redo": True}
    tables = [dode.distil(small(), micro_batch=size, **little)["table"] for size in (0, 3)]
    errors = [table.rows[0].errors.dode[0] for table in tables]
    assert errors == pytest.approx(errors[:1] * 2, rel=1e-3)
    assert not said()


def two_prompts(model: Any, positive: Any, negative: Any, cfg: float) -> Any:
    return stock_node(
        "nodes_custom_sampler", "DualCFGGuider", model=model, cond1=positive, cond2=positive,
        negative=negative, cfg_conds=cfg, cfg_cond2_negative=cfg, style="regular",
    )  # fmt: skip


def one_prompt(model: Any, positive: Any, negative: Any, cfg: float) -> Any:
    return stock_node(
        "nodes_custom_sampler", "CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg
    )


@pytest.mark.parametrize("cfg", [2.0, 7.0])
@pytest.mark.parametrize("guider", [one_prompt, two_prompts])
def test_no_remark_on_guidance_that_is_not_so(guider, cfg, dode, said):
    """The table is of cfg 2. Of a guider whose scale is not known nothing is said.

    At cfg 7 a KSampler, which knows that, runs another row than the one that gave σ.
    """
    subject, table = dode.demo(), dode.shipped("eps")
    sampler = dode.run("DODE_Sampler", table=table, solver="any")["sampler"]
    sigmas = dode.run("DODE_Sigmas", table=table, steps=6, denoise=1.0, solver="any")["sigmas"]
    sampled = stock_node(
        "nodes_custom_sampler", "SamplerCustomAdvanced",
        noise=stock_node("nodes_custom_sampler", "RandomNoise", noise_seed=5),
        guider=guider(subject.model, subject.positive, subject.negative, cfg), sampler=sampler, sigmas=sigmas,
        latent_image=subject.latent,
    )["samples"]  # fmt: skip
    assert set(re.findall(r"this is cfg (\S+)", said())) <= ({"7"} if cfg == 7.0 else set())
    by_ksampler = dode.ksampler(subject, table, steps=6, cfg=cfg)["samples"]
    assert (rms(sampled, by_ksampler) < 1e-5) == (cfg == 2.0)
