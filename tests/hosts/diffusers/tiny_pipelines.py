"""diffusers' pipelines, tiny and with random weights, made from configs; embeddings stand for prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

SIZE = 8
"""Of a latent, along a side."""
CFG = 3.5


def _seeded(make: Any) -> Any:
    """A network with weights that its own seed decides, large enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make()
        for weight in network.parameters():
            weight.data += 0.05 * torch.randn(weight.shape)
    return network.eval()


def vae(channels: int = 4) -> Any:
    """One level, so a pixel is a number of the latent."""
    return _seeded(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=[4], norm_num_groups=2, latent_channels=channels,
            down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"],
        )
    )  # fmt: skip


def unet(**config: Any) -> Any:
    """Stable Diffusion's, by default 1.5's; with attention in its middle alone, which is quicker."""
    settings = {
        "sample_size": SIZE, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 2,
        "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
        "cross_attention_dim": 16, "attention_head_dim": 4,
    }  # fmt: skip
    return _seeded(lambda: diffusers.UNet2DConditionModel(**settings | config))


SD_CONFIG = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
}  # fmt: skip


def stable_diffusion(network: Any = None, of: Any = None, **schedule: Any) -> Any:
    """Stable Diffusion 1.5, without text encoder."""
    of = of or diffusers.StableDiffusionPipeline
    return _quiet(
        of(
            vae=vae(), unet=network or unet(), text_encoder=None, tokenizer=None, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
            scheduler=diffusers.EulerDiscreteScheduler(**SD_CONFIG | schedule),
        )
    )  # fmt: skip


def sdxl(of: Any = None) -> Any:
    """SDXL, without text encoders."""
    network = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    of = of or diffusers.StableDiffusionXLPipeline
    return _quiet(
        of(
            vae=vae(), unet=network, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
            scheduler=diffusers.EulerDiscreteScheduler(**SD_CONFIG), add_watermarker=False,
        )
    )  # fmt: skip


def sd3() -> Any:
    """Stable Diffusion 3, without text encoders."""
    network = _seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=SIZE, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=12, out_channels=4,
        )
    )  # fmt: skip
    return _quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=network, vae=vae(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=None, text_encoder_2=None, text_encoder_3=None, tokenizer=None, tokenizer_2=None,
            tokenizer_3=None,
        )
    )  # fmt: skip


def flux() -> Any:
    """Flux, without text encoders; its latents are packed."""
    network = _seeded(
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
        )
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return _quiet(
        diffusers.FluxPipeline(
            transformer=network, vae=vae(), scheduler=scheduler, text_encoder=None, text_encoder_2=None,
            tokenizer=None, tokenizer_2=None,
        )
    )  # fmt: skip


def wan() -> Any:
    """Wan, without text encoder and VAE: latents of five axes."""
    network = _seeded(
        lambda: diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=16, freq_dim=16,
            ffn_dim=16, num_layers=1, rope_max_seq_len=32,
        )
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    return _quiet(
        diffusers.WanPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=network, scheduler=scheduler
        )
    )


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sd, v": lambda: stable_diffusion(prediction_type="v_prediction"),
    "sd, x0": lambda: stable_diffusion(prediction_type="sample"),
    "sd img2img": lambda: stable_diffusion(of=diffusers.StableDiffusionImg2ImgPipeline),
    "sd inpaint": lambda: stable_diffusion(of=diffusers.StableDiffusionInpaintPipeline),
    "sdxl": sdxl,
    "sdxl img2img": lambda: sdxl(diffusers.StableDiffusionXLImg2ImgPipeline),
    "sd3": sd3,
    "flux": flux,
    "wan": wan,
    "sd with words": lambda: with_words("sd"),
}


def call(pipeline: Any, steps: int, batch: int = 2, **more: Any) -> Tensor:
    """A run from fixed embeddings and noise to latents."""
    return pipeline(num_inference_steps=steps, **arguments_of(pipeline, batch) | more, return_dict=False)[0]


def prompt_of(pipeline: Any, batch: int = 1) -> dict[str, Any]:
    """What stands for a prompt."""
    name = type(pipeline).__name__
    prompt = {"prompt_embeds": _randn(batch, 5, 16)}
    if "Flux" not in name:
        prompt["negative_prompt_embeds"] = _randn(batch, 5, 16, seed=2)
    if "XL" in name or "3" in name:
        prompt["negative_pooled_prompt_embeds"] = _randn(batch, 12, seed=3)
    if "XL" in name or "3" in name or "Flux" in name:
        prompt["pooled_prompt_embeds"] = _randn(batch, 12, seed=4)
    return prompt


def size_of(pipeline: Any) -> dict[str, Any]:
    """That of ``noise``, as a call takes it."""
    if "Wan" in type(pipeline).__name__:
        return {"height": 64, "width": 64, "num_frames": 5}
    return {"height": SIZE, "width": SIZE}


def arguments_of(pipeline: Any, batch: int = 2) -> dict[str, Any]:
    """What a run is told, but for its steps."""
    name = type(pipeline).__name__
    given = prompt_of(pipeline, batch) | {"output_type": "latent", "guidance_scale": CFG}
    if "Img2Img" in name or "Inpaint" in name:
        return given | {"image": _randn(1, 3, SIZE, SIZE, seed=6).clamp(-1, 1)}
    return given | size_of(pipeline) | {"latents": noise(pipeline, batch)}


def noise(pipeline: Any, batch: int = 2, seed: int = 5) -> Tensor:
    """As the pipeline takes it."""
    name = type(pipeline).__name__
    if "Wan" in name:
        return _randn(batch, 16, 2, 8, 8, seed=seed)
    if "Flux" in name:
        return _randn(batch, (SIZE // 2) ** 2, 16, seed=seed)
    return _randn(batch, 4, SIZE, SIZE, seed=seed)


def error(got: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the RMS."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.square().mean().sqrt())


def plain_euler(pipeline: Any) -> Any:
    """diffusers' own Euler for it; at whole t, where its σ and its t are one another's to the last digit."""
    config = pipeline.scheduler.config
    if "beta_schedule" in config and config.prediction_type != "flow_prediction":
        return diffusers.EulerDiscreteScheduler.from_config(config, timestep_spacing="leading")
    dynamic = config.get("use_dynamic_shifting", False)
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)


def controlled(pipeline: Any) -> Any:
    """Stable Diffusion's pipeline with a ControlNet."""
    network = _seeded(
        lambda: diffusers.ControlNetModel(
            **{key: pipeline.unet.config[key] for key in (
                "block_out_channels", "layers_per_block", "norm_num_groups", "down_block_types", "cross_attention_dim",
                "attention_head_dim",
            )},
            conditioning_embedding_out_channels=(4,),
        )
    )  # fmt: skip
    return _quiet(
        diffusers.StableDiffusionControlNetPipeline(
            **pipeline.components, controlnet=network, requires_safety_checker=False
        )
    )


WORDS = ("<|startoftext|>", "<|endoftext|>", "a</w>", "cat</w>", "dog</w>", "c", "a", "t")


def _clip(width: int, projection: int | None = None) -> tuple[Any, Any]:
    """A tokenizer that knows a few words, and an encoder; with ``projection``, of pooled embeddings, too."""
    import transformers

    tokenizer = transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(WORDS)}, merges=[], model_max_length=8
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, eos_token_id=1, bos_token_id=0, pad_token_id=1, projection_dim=projection or 16,
    )  # fmt: skip
    of = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return tokenizer, _seeded(lambda: of(config))


def _t5(of: str, width: int = 16) -> tuple[Any, Any]:
    import transformers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁cat", -1.0), ("▁dog", -1.0)]
    tokenizer = transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=8)
    config = getattr(transformers, f"{of}Config")(
        vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    return tokenizer, _seeded(lambda: getattr(transformers, f"{of}EncoderModel")(config))


def with_words(name: str) -> Any:
    """One of the pipelines that takes a text."""
    pipeline = PIPELINES[name]()
    parts: dict[str, Any] = {}
    if name == "sd":
        parts["tokenizer"], parts["text_encoder"] = _clip(16)
    if name == "sdxl":
        parts["tokenizer"], parts["text_encoder"] = _clip(8)
        parts["tokenizer_2"], parts["text_encoder_2"] = _clip(8, 12)
    if name == "sd3":
        parts["tokenizer"], parts["text_encoder"] = _clip(8, 6)
        parts["tokenizer_2"], parts["text_encoder_2"] = _clip(8, 6)
    if name == "flux":
        parts["tokenizer"], parts["text_encoder"] = _clip(12)
        parts["tokenizer_2"], parts["text_encoder_2"] = _t5("T5")
    if name == "wan":
        parts["tokenizer"], parts["text_encoder"] = _t5("UMT5")
    pipeline.register_modules(**parts)
    return pipeline
