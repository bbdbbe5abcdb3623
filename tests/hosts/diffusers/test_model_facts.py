"""The same weights in a pipeline and in ComfyUI: a table that was made in one is recognised in the other."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig

from dode_nodes import DodeError, LambdaRow, LambdaTable
from dode_nodes.hosts.diffusers import DODEScheduler, check_pipeline
from dode_nodes.hosts.diffusers.model_facts import model_facts
from tests.hosts.comfy.tiny_networks import FLUX, MMDIT, UNET, in_diffusers_layout, real
from tests.hosts.diffusers.tiny_pipelines import SD_CONFIG, stable_diffusion, vae


def table_of(facts: dict[str, Any]) -> LambdaTable:
    row = LambdaRow("euler", np.array([2.0, 1.5, 0]), (1, 1), np.zeros(2))
    return LambdaTable([row], model=facts)


@pytest.fixture
def sd(pipeline):
    return pipeline("sd")


def test_a_pipeline_knows_its_own_table(pipeline):
    for name in ("sd", "sd, v", "sdxl", "sd3", "flux", "wan"):
        pipe = pipeline(name)
        table = table_of(model_facts(pipe))
        pipe.scheduler = DODEScheduler.from_table(table, pipe.scheduler.config)
        assert check_pipeline(table, pipe) == []


def test_other_weights_and_other_kinds_are_told(pipeline, sd):
    table = table_of(model_facts(sd))
    sd.unet = copy.deepcopy(sd.unet)
    for weight in sd.unet.parameters():
        weight.data *= 1.05
    assert check_pipeline(table, sd) == [
        "the λ table was made for another checkpoint of this family; distil a table for this model"
    ]
    with pytest.raises(DodeError, match="prediction type is 'eps', this model's is 'v'"):
        check_pipeline(table, pipeline("sd, v"))
    with pytest.raises(DodeError, match="family is 'flux', this model's is 'sd3'"):
        check_pipeline(table_of(model_facts(pipeline("flux"))), pipeline("sd3"))


def test_a_lora_beside_the_weights_is_no_other_checkpoint(sd):
    table = table_of(model_facts(sd))
    sd.unet = copy.deepcopy(sd.unet)
    sd.unet.add_adapter(LoraConfig(r=2, lora_alpha=1, target_modules=["to_q"], init_lora_weights=False))
    assert model_facts(sd)["patches"] == {"weights": 2, "strengths": [0.5]}
    assert check_pipeline(table, sd) == ["the λ table was made with different LoRAs or patches on this model"]
    sd.disable_lora()
    assert check_pipeline(table, sd) == []


def test_two_loras_are_no_two_checkpoints(sd):
    def with_lora(seed: int) -> Any:
        pipe = copy.copy(sd)
        pipe.unet = copy.deepcopy(sd.unet)
        torch.manual_seed(seed)
        layers = ["to_q", "to_k", "to_v", "conv1", "conv2"]
        pipe.unet.add_adapter(LoraConfig(r=8, target_modules=layers, init_lora_weights=False))
        return pipe

    assert check_pipeline(table_of(model_facts(with_lora(0))), with_lora(1)) == []


def test_an_offloaded_network_is_the_same(sd):
    facts = model_facts(sd)
    sd.unet = accelerate.cpu_offload(copy.deepcopy(sd.unet), torch.device("cpu"))
    assert next(sd.unet.parameters()).is_meta
    assert model_facts(sd) == facts


def test_a_half_precision_copy_is_the_same(sd):
    table = table_of(model_facts(sd))
    assert check_pipeline(table, copy.deepcopy(sd).to(torch.float16)) == []


def test_families_of_unets_are_told_by_what_they_are_conditioned_on(sd):
    for width, family in ((768, "sd15"), (1024, "sd2")):
        sd.unet = diffusers.UNet2DConditionModel(
            block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            norm_num_groups=2, layers_per_block=1, attention_head_dim=4, cross_attention_dim=width,
        )  # fmt: skip
        assert model_facts(sd)["family"] == family


def _unet_pipeline() -> Any:
    network = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip
    return stable_diffusion(network), network


def _flow_pipeline(of: Any, network: Any, **scheduler: Any) -> Any:
    parts = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    if of is diffusers.StableDiffusion3Pipeline:
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    plain = diffusers.FlowMatchEulerDiscreteScheduler(**scheduler)
    return of(transformer=network, vae=vae(16), scheduler=plain, **parts), network


def _flux_pipeline() -> Any:
    network = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return _flow_pipeline(diffusers.FluxPipeline, network, shift=3.0, use_dynamic_shifting=True)


def _sd3_pipeline() -> Any:
    network = diffusers.SD3Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=40, caption_projection_dim=128, pooled_projection_dim=48, pos_embed_max_size=16,
        qk_norm="rms_norm",
    )  # fmt: skip
    return _flow_pipeline(diffusers.StableDiffusion3Pipeline, network, shift=3.0)


@pytest.mark.comfyui
@pytest.mark.parametrize(("family", "config", "make"), [
    ("SD15", UNET, _unet_pipeline), ("Flux", FLUX, _flux_pipeline), ("SD3", MMDIT, _sd3_pipeline),
])  # fmt: skip
def test_comfyui_and_diffusers_recognise_each_others_tables(comfyui, family, config, make):
    import comfy.supported_models

    from dode_nodes.hosts.comfy import model_facts as of_comfyui

    model = real(getattr(comfy.supported_models, family), config)
    pipe, network = make()
    theirs = in_diffusers_layout(model.model.diffusion_model.state_dict(), config)
    missing = network.load_state_dict(theirs, strict=False)
    assert not missing.unexpected_keys
    assert len(missing.missing_keys) < 5, missing.missing_keys

    facts, facts_there = model_facts(pipe), of_comfyui.model_facts(model)
    assert facts["prediction_type"] == ("eps" if family == "SD15" else "flow")
    assert check_pipeline(table_of(facts_there), pipe) == []
    assert of_comfyui.check_model(facts, model) == []
    for weight in network.parameters():
        weight.data *= 1.01
    (remark,) = check_pipeline(table_of(facts_there), pipe)
    assert "another checkpoint" in remark
    (remark,) = of_comfyui.check_model(model_facts(pipe), model)
    assert "another checkpoint" in remark


def test_a_range_of_sigma_is_compared(sd):
    table = table_of(model_facts(sd))
    config = SD_CONFIG | {"rescale_betas_zero_snr": True}
    sd.scheduler = diffusers.EulerDiscreteScheduler(**config)
    (remark,) = check_pipeline(table, sd)
    assert remark.startswith("the λ table was made for σ from 14.6146")
