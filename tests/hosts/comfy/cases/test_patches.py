"""Distill λ's runs are a KSampler's on models that core's nodes have patched, or what cannot be right is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.hosts.comfy.cases import subjects
from tests.hosts.comfy.cases.fidelity import assert_faithful
from tests.hosts.comfy.cases.hooks import random_lora
from tests.hosts.comfy.cases.subjects import Subject, flux_prompt, small, stock_node, windows
from tests.hosts.conftest import conditioning

pytestmark = pytest.mark.comfyui

Node = tuple[str, str, dict[str, Any]]
"""Module, class, and inputs but for the model."""


def _patched(subject: Subject, *nodes: Node) -> Subject:
    """By each of the nodes that this ComfyUI has."""
    model, applied = subject.model, 0
    for module, name, inputs in nodes:
        try:
            model = stock_node(module, name, model=model, **inputs)
        except (ImportError, AttributeError) as error:
            if name not in str(error) and module not in str(error):
                raise
        else:
            applied += 1
    if not applied:
        pytest.skip("this ComfyUI has no such node")
    return replace(subject, model=model)


GUIDANCE: list[Node] = [
    ("nodes_model_advanced", "RescaleCFG", {"multiplier": 0.7}),
    ("nodes_cfg", "CFGZeroStar", {}),
    ("nodes_cfg", "CFGNorm", {"strength": 0.9}),
    ("nodes_tcfg", "TCFG", {}),
    ("nodes_apg", "APG", {"eta": 0.8, "norm_threshold": 5.0, "momentum": 0.0}),
    ("nodes_fresca", "FreSca", {"scale_low": 1.0, "scale_high": 1.25, "freq_cutoff": 1}),
    ("nodes_eps", "EpsilonScaling", {"scaling_factor": 1.005}),
    ("nodes_custom_sampler", "CFGOverride", {"cfg": 1.0, "start_percent": 0.4, "end_percent": 1.0}),
]
DOWNSCALE = {
    "block_number": 1, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.35,
    "downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic",
}  # fmt: skip
ATTENTION: list[Node] = [
    ("nodes_sag", "SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
    ("nodes_freelunch", "FreeU_V2", {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}),
    ("nodes_attention_multiply", "UNetSelfAttentionMultiply", {"q": 1.2, "k": 0.9, "v": 1.0, "out": 1.1}),
    ("nodes_nag", "NAGuidance", {"nag_scale": 3.0, "nag_alpha": 0.5, "nag_tau": 1.5}),
]
MORE_ATTENTION: list[Node] = [
    ("nodes_pag", "PerturbedAttentionGuidance", {"scale": 1.0}),
    ("nodes_hypertile", "HyperTile", {"tile_size": 32, "swap_size": 1, "max_depth": 0, "scale_depth": False}),
    ("nodes_model_downscale", "PatchModelAddDownscale", DOWNSCALE),
]


V: Node = ("nodes_model_advanced", "ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True})
EDM_RANGE = {"sampling": "eps", "sigma_max": 80.0, "sigma_min": 0.01}
EDM: Node = ("nodes_model_advanced", "ModelSamplingContinuousEDM", EDM_RANGE)
SHIFT: Node = ("nodes_model_advanced", "ModelSamplingSD3", {"shift": 3.0})


@pytest.mark.parametrize(
    ("kind", "nodes"),
    [
        pytest.param("eps", GUIDANCE, id="guidance"),
        pytest.param("eps", [V], id="v, zero terminal SNR"),
        pytest.param("eps", [EDM], id="EDM"),
        pytest.param("flow", [SHIFT], id="a shift"),
    ],
)
def test_the_embedded_model(kind, nodes, dode):
    subject = _patched(small(kind), *nodes)
    assert_faithful(dode, subject, subject.positive, conditioning(5.0), scale=2)


def test_a_lora_that_is_loaded_for_the_whole_run(dode):
    subject = small()
    patched = subject.model.clone()
    patched.add_patches(random_lora(subject.model, "add_patches"), 0.7)
    assert_faithful(dode, replace(subject, model=patched), subject.positive, conditioning(5.0), scale=2)


@pytest.mark.parametrize("nodes", [ATTENTION, MORE_ATTENTION], ids=["attention", "more attention"])
def test_a_network_with_attention(nodes, dode):
    subject = replace(_patched(subjects.unet(levels=subjects.TWO_LEVELS), *nodes), latent=subjects.empty(8))
    assert_faithful(dode, subject, subject.positive, scale=2)


def test_two_models_merged(dode):
    subject = subjects.unet()
    shares = {"input": 0.6, "middle": 0.2, "out": 0.7}
    merged = stock_node(
        "nodes_model_merging",
        "ModelMergeBlocks",
        model1=subject.model,
        model2=subjects.unet(5).model,
        **shares,
    )
    assert_faithful(dode, replace(subject, model=merged), subject.positive, scale=2)


def test_layers_that_are_skipped_in_a_part_of_the_run(dode):
    settings = {
        "double_layers": "0", "single_layers": "0", "scale": 3.0, "start_percent": 0.1, "end_percent": 0.6,
        "rescaling_scale": 0.0,
    }  # fmt: skip
    subject = _patched(subjects.flux(), ("nodes_slg", "SkipLayerGuidanceDiT", settings))
    assert_faithful(dode, subject, subject.positive, flux_prompt(3), scale=2)


@pytest.mark.parametrize("schedule", ["looped_uniform", "standard_static"])
def test_context_windows(schedule, dode):
    """They move from step to step, or noise is shuffled for them. ComfyUI makes them of one latent at a time."""
    subject = small()
    windowed = replace(
        subject, model=windows(subject.model, schedule, shuffled=schedule == "standard_static")
    )
    assert_faithful(dode, windowed, subject.positive, scale=2, latents=2, micro_batch=1)


def test_context_windows_of_several_latents_are_refused_by_name(dode):
    subject = small()
    windowed = replace(subject, model=windows(subject.model, "standard_static"))
    with pytest.raises(dode.library.DodeError, match=r"micro_batch to 1: .*ContextWindows"):
        dode.distil(windowed, latents=4, steps="3")


@pytest.mark.parametrize(
    ("nodes", "named"),
    [
        ([("nodes_tomesd", "TomePatchModel", {"ratio": 0.3})], "random patch .*TomePatchModel"),
        (
            [("nodes_hypertile", "HyperTile", {"tile_size": 32, "swap_size": 8, "max_depth": 1, "scale_depth": False})],
            "random patch .*HyperTile",
        ),
        ([("nodes_video_model", "VideoLinearCFGGuidance", {"min_cfg": 1.0})], "micro_batch to 1: .*VideoLinearCFG"),
        ([("nodes_eps", "TemporalScoreRescaling", {"tsr_k": 0.9, "tsr_sigma": 1.0})], "micro_batch to 1: .*Temporal"),
    ],
)  # fmt: skip
def test_what_is_no_function_of_a_latent_is_refused_by_name(nodes, named, dode):
    subject = _patched(replace(subjects.unet(levels=subjects.TWO_LEVELS), latent=subjects.empty(16)), *nodes)
    with pytest.raises(dode.library.DodeError, match=named):
        dode.distil(subject, latents=4, steps="3")
    assert len(subject.calls) <= 16  # of the check alone


def test_a_cache_of_pictures_to_refer_to_is_refused_by_name(dode):
    subject = _patched(subjects.flux(), ("nodes_flux", "FluxKVCache", {}))
    with pytest.raises(dode.library.DodeError, match="Flux KV Cache"):
        dode.distil(subject, latents=4, steps="3")
    assert not subject.calls
