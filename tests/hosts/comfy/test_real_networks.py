"""ComfyUI's own networks, tiny and with random weights, and the embedded trained ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dode_nodes.fit.latents import root_mean_square

pytestmark = pytest.mark.comfyui

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1],
    "channel_mult": [1], "transformer_depth": [1], "transformer_depth_output": [0, 0],
    "transformer_depth_middle": -2, "context_dim": 16, "num_heads": 2, "use_spatial_transformer": True,
    "legacy": False, "dtype": torch.float32,
}  # fmt: skip
MMDIT = {
    "in_channels": 16, "patch_size": 2, "depth": 1, "pos_embed_max_size": 16,
    "pos_embed_scaling_factor": None, "num_patches": 256, "adm_in_channels": 64,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 64}},
    "dtype": torch.float32,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "ffn_dim": 64, "freq_dim": 32, "text_dim": 32,
    "num_heads": 1, "num_layers": 1, "text_len": 5, "in_dim": 16, "out_dim": 16, "dtype": torch.float32,
}  # fmt: skip
AUDIO = {
    "audio_model": "dit1.0", "io_channels": 64, "embed_dim": 64, "cond_token_dim": 768,
    "global_cond_dim": 1536, "depth": 1, "num_heads": 1, "project_cond_tokens": True, "dtype": torch.float32,
}  # fmt: skip


def _patcher(model: Any) -> Any:
    import comfy.model_patcher

    generator = torch.Generator().manual_seed(0)
    weights = [*model.parameters(), *model.diffusion_model.buffers()]
    for weight in weights:  # they come uninitialised
        weight.data = torch.randn(weight.shape, generator=generator) * 0.05
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def _unet() -> tuple[Any, Any, tuple[int, ...]]:
    import comfy.model_base
    import comfy.supported_models

    model = _patcher(comfy.model_base.BaseModel(comfy.supported_models.SD15(dict(UNET))))
    return model, [[torch.ones(1, 5, 16), {}]], (1, 4, 8, 8)


def _unet_v() -> tuple[Any, Any, tuple[int, ...]]:
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model, prompt, shape = _unet()
    return ModelSamplingDiscrete().patch(model, "v_prediction", False)[0], prompt, shape


def _sd3() -> tuple[Any, Any, tuple[int, ...]]:
    import comfy.model_base
    import comfy.supported_models

    model = _patcher(comfy.model_base.SD3(comfy.supported_models.SD3(dict(MMDIT))))
    return model, [[torch.ones(1, 5, 64), {"pooled_output": torch.ones(1, 64)}]], (1, 16, 8, 8)


def _wan() -> tuple[Any, Any, tuple[int, ...]]:
    """Videos, ``[B, C, frames, H, W]``."""
    import comfy.model_base
    import comfy.supported_models

    model = _patcher(comfy.model_base.WAN21(comfy.supported_models.WAN21_T2V(dict(WAN))))
    return model, [[torch.ones(1, 5, 32), {}]], (1, 16, 3, 4, 4)


def _audio() -> tuple[Any, Any, tuple[int, ...]]:
    """Sound, ``[B, C, time]``."""
    import comfy.ldm.audio.embedders
    import comfy.model_base
    import comfy.supported_models

    seconds = comfy.ldm.audio.embedders.NumberConditioner(768, min_val=0, max_val=512).state_dict()
    config = comfy.supported_models.StableAudio(dict(AUDIO))
    model = _patcher(comfy.model_base.StableAudio1(config, seconds, seconds))
    return model, [[torch.ones(1, 5, 768), {}]], (1, 64, 20)


@pytest.mark.parametrize("make", [_unet, _unet_v, _sd3, _wan, _audio])
def test_distil_sample_and_apply(make, run_node, pack, dode):
    import comfy.sample

    with torch.inference_mode(False):
        model, prompt, shape = make()
    latent = {"samples": torch.zeros(shape)}
    scheduler = "simple" if make in (_sd3, _wan) else "karras"
    changes = {
        "positive": prompt,
        "negative": prompt,
        "latent": latent,
        "latents": 4,
        "steps": "5",
        "scale": 3,
    }
    table = dode.table(model, **changes, scheduler=scheduler, cfg=1.5)
    (row,) = table.rows
    assert row.error_from() <= row.errors.stock

    settings = {"steps": 5, "cfg": 1.5, "seed": 3, "denoise": 1.0, "solver": "any"}
    (sampled,) = run_node(
        pack.DodeKSampler,
        model=model,
        table=table,
        latent_image=latent,
        positive=prompt,
        negative=prompt,
        **settings,
    )
    (patched,) = run_node(pack.ApplyLambdas, model=model, table=table, solver="any")
    noise = comfy.sample.prepare_noise(latent["samples"], 3)
    applied = comfy.sample.sample(
        patched, noise, 5, 1.5, "euler", scheduler, prompt, prompt, latent["samples"], seed=3
    )
    torch.testing.assert_close(applied, sampled["samples"], rtol=1e-4, atol=1e-4)
    assert sampled["samples"].isfinite().all()


@pytest.mark.slow_host  # how much they gain is the fit's: what a host makes of a network is tested above
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_the_trained_models_gain_on_fresh_noise(kind, run_node, pack, dode):
    model, positive, negative, _ = run_node(pack.DemoModel, kind=kind, digit=3)
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    scheduler = {"eps": "karras", "flow": "simple"}[kind]
    changes = {
        "positive": positive,
        "negative": negative,
        "latent": latent,
        "steps": "6",
        "scheduler": scheduler,
    }
    table = dode.table(model, **changes)
    rows = [
        replace(row, best_stock=None) for row in table.rows
    ]  # beside the plain solver: λ alone, few latents
    table = replace(table, rows=rows)
    _, _, stock, dode, teacher = run_node(
        pack.CompareSamplers, model=model, positive=positive, negative=negative, cfg=2.0, latent=latent,
        table=table, steps=6, solver="any", pictures=4, seed=99, scale=6,
    )  # fmt: skip
    errors = [root_mean_square(result["samples"] - teacher["samples"]) for result in (dode, stock)]
    assert errors[0] < 0.8 * errors[1]
