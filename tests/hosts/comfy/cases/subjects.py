"""Models to try the nodes on, each with prompts that mean something to it; and ComfyUI's own sampling of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.checkpoints import write_sd15
from tests.hosts.conftest import conditioning, mixture_denoised, offsets_of

Conditioning = list[list[Any]]
Latent = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model, its prompts and an empty latent.

    Attributes:
        scheduler: one that suits the model.
        calls: the batch size of each of the network's evaluations so far, guidance included; those of patched
            clones, too.
    """

    model: Any
    positive: Conditioning
    negative: Conditioning
    latent: Latent
    scheduler: str
    calls: list[int]


def watch(model: Any) -> list[int]:
    """The batch sizes of all evaluations of a model's network from now on."""
    calls: list[int] = []
    evaluate = model.model._apply_model

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(x))
        return evaluate(x, *args, **kwargs)

    model.model._apply_model = watched
    return calls


def mixture(kind: str, channels: int, shape: tuple[int, ...], **format_attributes: Any) -> Subject:
    """A closed form: every number of a latent of ``shape`` is drawn from three Gaussians."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.supported_models_base

    class Config(comfy.supported_models_base.BASE):
        sampling_settings = {"shift": 1.0}  # noqa: RUF012
        memory_usage_factor = 0.01

        def __init__(self) -> None:
            super().__init__({"disable_unet_model_creation": True, "in_channels": channels})
            self.latent_format = comfy.latent_formats.LatentFormat()
            attributes = {"latent_channels": channels, "latent_dimensions": len(shape) - 2}
            vars(self.latent_format).update(attributes | format_attributes)

    class Mixture(comfy.model_base.BaseModel):
        def _apply_model(
            self, x: Tensor, t: Tensor, c_concat: None, c_crossattn: Tensor, *args: Any, **kwargs: Any
        ) -> Tensor:
            flow = self.model_type == comfy.model_base.ModelType.FLOW
            return mixture_denoised(x, t, offsets_of(c_crossattn, x), flow)

    network = Mixture(Config(), getattr(comfy.model_base.ModelType, kind))
    network.diffusion_model = nn.Linear(16, 16)
    network.diffusion_model.dtype = torch.float32
    model = _patcher(network)
    scheduler = "simple" if kind == "FLOW" else "karras"
    latent = {"samples": torch.zeros(shape)}
    return Subject(model, conditioning(0.2), conditioning(-0.1), latent, scheduler, watch(model))


class _Small(nn.Module):
    """What a network answers, where each number's three Gaussians lie as the prompt and what is around it say.

    Args:
        sigma: of a timestep.
    """

    dtype = torch.float32

    def __init__(self, flow: bool, sigma: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._flow, self._sigma = flow, sigma
        self.around = nn.Conv2d(4, 4, 3, padding=1)
        self.prompt = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **kwargs: Any) -> Tensor:
        sigma = self._sigma(timesteps)
        per_row = sigma.reshape(-1, 1, 1, 1)
        prompt = self.prompt(context[:, 0] / 10)[..., None, None]
        offset = 4 * prompt + 0.3 * torch.tanh(self.around(x))
        noisy = x if self._flow else x * (per_row**2 + 1).sqrt()
        return (noisy - mixture_denoised(noisy, sigma, offset, self._flow)) / per_row


def small(kind: str = "eps", side: int = 4) -> Subject:
    """A network in the embedded "eps" or "flow" model's place that costs next to nothing: it has weights, positions see
    one another, and a prompt is a number from 0 to 10."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_sampling
    import comfy.supported_models_base

    class Config(comfy.supported_models_base.BASE):
        unet_config = {"disable_unet_model_creation": True, "in_channels": 4}  # noqa: RUF012
        sampling_settings = {"shift": 1.0}  # noqa: RUF012
        memory_usage_factor = 0.01
        latent_format = comfy.latent_formats.LatentFormat

    flow = kind == "flow"
    model_type = comfy.model_base.ModelType.FLOW if flow else comfy.model_base.ModelType.EPS
    network = comfy.model_base.BaseModel(Config(Config.unet_config), model_type)
    sigma_of = comfy.model_sampling.ModelSamplingDiscrete().sigma
    network.diffusion_model = _Small(flow, (lambda timesteps: timesteps / 1000) if flow else sigma_of)
    _fill(network.diffusion_model, 0)
    model = _patcher(network)
    scheduler = "simple" if flow else "karras"
    return Subject(model, conditioning(3.0), conditioning(10.0), empty(side), scheduler, watch(model))


def sd15(checkpoint: Path) -> Subject:
    """A tiny Stable Diffusion 1.5, by ComfyUI's own loader; the file is written where it is missing."""
    import comfy.sd

    if not checkpoint.exists():
        write_sd15(checkpoint, text_encoder=False)
    model, *_ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False, output_clip=False)
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    return Subject(model, _context(1, 77, 768), _context(2, 77, 768), latent, "karras", watch(model))


UNET = {
    "image_size": 32, "in_channels": 4, "model_channels": 32, "num_res_blocks": [1], "channel_mult": [1],
    "transformer_depth": [1], "transformer_depth_middle": 1, "use_spatial_transformer": True, "context_dim": 16,
    "num_heads": 4, "legacy": False, "dtype": torch.float32,
}  # fmt: skip


TWO_LEVELS = {
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 0],
    "transformer_depth_output": [1, 0, 0, 0],
}  # fmt: skip
"""Of a U-Net that patches have more than one resolution to act on."""


def unet(
    seed: int = 0,
    in_channels: int = 4,
    weights: torch.dtype = torch.float32,
    levels: Mapping[str, Sequence[int]] | None = None,
) -> Subject:
    """A tiny U-Net with attention and random weights. With nine channels, one for inpainting.

    Args:
        weights: what they are kept in; the network computes in single precision.
        levels: its resolutions; None for one.
    """
    import comfy.model_base
    import comfy.supported_models

    settings = {"out_channels": 4, "transformer_depth_output": [1, 0], "in_channels": in_channels}
    config = comfy.supported_models.SD15(UNET | settings | dict(levels or {}))
    if weights != torch.float32:
        config.set_inference_dtype(weights, torch.float32)
    network = comfy.model_base.BaseModel(config, device=torch.device("cpu"))
    if in_channels == 9:
        network.set_inpaint()
    _fill(network, seed)
    model = _patcher(network)
    latent = {"samples": torch.zeros(1, 4, 4, 4)}
    return Subject(model, _context(1, 7, 16), _context(2, 7, 16), latent, "karras", watch(model))


def controlnet(seed: int = 3) -> Any:
    """A ControlNet for ``unet``. One convolution looks at its picture, for all latents of a batch each time."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential

    cpu, operations = torch.device("cpu"), comfy.ops.disable_weight_init
    network = comfy.cldm.cldm.ControlNet(**UNET, hint_channels=3, device=cpu, operations=operations)
    network.input_hint_block = TimestepEmbedSequential(operations.Conv2d(3, UNET["model_channels"], 8, 8))
    _fill(network, seed)
    return comfy.controlnet.ControlNet(network, load_device=cpu)


def flux() -> Subject:
    """A tiny Flux with random weights."""
    import comfy.ldm.flux.model
    import comfy.model_base
    import comfy.supported_models

    newer = (
        {"txt_ids_dims": []}
        if "txt_ids_dims" in vars(comfy.ldm.flux.model.FluxParams)["__annotations__"]
        else {}
    )
    settings = {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 16,
        "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
        "dtype": torch.float32,
    }  # fmt: skip
    config = comfy.supported_models.Flux(settings | newer)
    network = comfy.model_base.Flux(config, device=torch.device("cpu"))
    _fill(network, 0)
    model = _patcher(network)
    latent = {"samples": torch.zeros(1, 16, 4, 4)}
    return Subject(model, flux_prompt(1), flux_prompt(2), latent, "simple", watch(model))


def flux_prompt(seed: int, **settings: Any) -> Conditioning:
    """For ``flux``."""
    pooled = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
    return _context(seed, 7, 16, pooled_output=pooled, **settings)


def empty(side: int, channels: int = 4) -> Latent:
    """A latent of nothing."""
    return {"samples": torch.zeros(1, channels, side, side)}


def unet_prompt(seed: int, **settings: Any) -> Conditioning:
    """For ``unet``."""
    return _context(seed, 7, 16, **settings)


def _fill(network: nn.Module, seed: int) -> None:
    """Random weights, of a gain a little below 1; normalisations are plain."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            values = torch.randn(weight.shape, generator=generator) * 0.7 / weight[0].numel() ** 0.5
            weight.data = values.to(weight.dtype)
        else:
            weight.data = torch.full_like(weight, float(name.endswith(("weight", "scale"))))


FRAMES = 14


def video() -> Subject:
    """A tiny Stable Video Diffusion: the batch of its latent is the frames of one video."""
    import comfy.model_base
    import comfy.supported_models

    unet = {
        "image_size": 32, "in_channels": 8, "out_channels": 4, "model_channels": 64, "channel_mult": [1],
        "num_res_blocks": [1], "transformer_depth": [1], "transformer_depth_output": [0, 0],
        "transformer_depth_middle": -2, "use_spatial_transformer": True, "context_dim": 1024, "num_heads": -1,
        "num_head_channels": 64, "use_linear_in_transformer": True, "adm_in_channels": 768,
        "num_classes": "sequential", "use_temporal_attention": True, "use_temporal_resblock": True,
        "legacy": False, "extra_ff_mix_layer": True, "merge_strategy": "learned_with_images",
        "merge_factor": 0.0, "video_kernel_size": [3, 1, 1], "disable_temporal_crossattention": False,
        "max_ddpm_temb_period": 10000, "dtype": torch.float32,
    }  # fmt: skip
    network = comfy.model_base.SVD_img2vid(
        comfy.supported_models.SVD_img2vid(unet), device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3 / weight[0].numel() ** 0.5
        else:
            weight.data = torch.full_like(weight, float(name.endswith("weight")))
    model = _patcher(network)
    settings = {"motion_bucket_id": 127, "fps": 6, "augmentation_level": 0.0}
    picture = torch.randn(1, 4, 8, 8, generator=generator)
    positive = _context(1, 1, 1024, **settings, concat_latent_image=picture)
    negative = [[torch.zeros(1, 1, 1024), settings | {"concat_latent_image": torch.zeros(1, 4, 8, 8)}]]
    return Subject(
        model, positive, negative, {"samples": torch.zeros(FRAMES, 4, 8, 8)}, "karras", watch(model)
    )


def _patcher(network: nn.Module) -> Any:
    import comfy.model_patcher

    return comfy.model_patcher.ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))


def _context(seed: int, tokens: int, width: int, **settings: Any) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, width, generator=generator), settings]]


def stock_node(module: str, name: str, **inputs: Any) -> Any:
    """The first output of a node of comfy_extras, or of ``nodes``, of either generation; else see ``stock_nodes``."""
    return stock_nodes(module, name, **inputs)[0]


def stock_nodes(module: str, name: str, **inputs: Any) -> Sequence[Any]:
    """All of them. Inputs that newer ComfyUIs have added are as the node has them."""
    node = getattr(importlib.import_module(module if module == "nodes" else f"comfy_extras.{module}"), name)
    if not hasattr(node, "PREPARE_CLASS_CLONE"):
        return getattr(node(), node.FUNCTION)(**inputs)
    asked = {
        each.id: getattr(each, "default", None) for each in node.define_schema().inputs if not each.optional
    }
    given = {name: value for name, value in asked.items() if value is not None} | inputs
    return node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).EXECUTE_NORMALIZED(**given).args


def windows(model: Any, schedule: str, *, shuffled: bool = False) -> Any:
    """The model on two columns of a latent at a time, as on a video's frames.

    Args:
        shuffled: noise is, where this ComfyUI can.
    """
    import comfy.context_windows as host

    newer = {"causal_window_fix": False, "freenoise": shuffled} if hasattr(host, "apply_freenoise") else {}
    return stock_node(
        "nodes_context_windows", "ContextWindowsManualNode", model=model, context_length=2, context_overlap=1,
        context_schedule=schedule, context_stride=1, closed_loop=False, fuse_method="pyramid", dim=3, **newer,
    )  # fmt: skip


def ksampler(subject: Subject, latent: Latent | None = None, **changes: Any) -> Tensor:
    """The latent of ComfyUI's KSampler node."""
    import nodes

    settings = {
        "seed": 5, "steps": 5, "cfg": 2.0, "sampler_name": "euler", "scheduler": subject.scheduler,
        "denoise": 1.0, "positive": subject.positive, "negative": subject.negative,
        "latent": subject.latent if latent is None else latent,
    }  # fmt: skip
    (result,) = nodes.common_ksampler(subject.model, **(settings | changes))
    return result["samples"]


def rms(a: Tensor, b: Tensor) -> float:
    """Root of the mean square of the difference."""
    return float((a.double() - b.double()).square().mean().sqrt())
