"""A checkpoint for the command line: ComfyUI loads it and makes its prompts and schedules, without its server."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ...errors import DodeError
from ...fit.known import KnownFit
from ...fit.progress import Reporter
from ...fit.quality import start_schedule
from ...fit.recipe import Recipe
from ...sampling.solvers import use_host
from .combinations import Combinations
from .fit_key import key_of_request, key_of_training
from .guiders import Conditioning, cfg_guider
from .host_samplers import host_names, host_sampler
from .job import Distillation, Request, schedule, schedules_of
from .lora_job import LoraDistillation, LoraRequest
from .model_facts import is_flow

_SIZE = (512, 512)
_PIXELS = 8  # per number of a latent, along a side


def combinations_of(options: argparse.Namespace) -> Combinations:
    """What the command's options bring together.

    Raises:
        DodeError: the checkpoint cannot be loaded or lacks something, or there is no such size.
    """
    use_host(host_sampler, host_names)
    latent = _empty_latent(*(options.size or _SIZE))
    model, clip = _load(options.checkpoint)
    *positives, negative = _encoded(clip, [*options.prompt, options.negative or ""])
    return Combinations(
        guiders=[cfg_guider(model, positive, negative, options.cfg) for positive in positives],
        latent=comfy.sample.fix_empty_latent_channels(model, latent),
        seed=options.seed,
        micro_batch=options.micro_batch or 0,
    )


def distillation(
    combinations: Combinations, options: argparse.Namespace, recipe: Recipe, reporter: Reporter
) -> tuple[Distillation, KnownFit]:
    """What the command's options ask for, and what is known of it.

    Raises:
        DodeError: ComfyUI has no such schedule.
    """
    model = combinations.model
    scheduler = options.schedule or start_schedule(flow=is_flow(model))
    if scheduler not in comfy.samplers.SCHEDULER_NAMES:
        names = ", ".join(comfy.samplers.SCHEDULER_NAMES)
        raise DodeError(f"no schedule is called '{scheduler}'; this ComfyUI has {names}")
    recipe = replace(recipe, make_sigmas=schedules_of(model))
    request = Request(
        **combinations.parts,
        count=options.latents,
        schedules=[schedule(model, options.solver, scheduler, steps) for steps in options.steps],
        recipe=replace(recipe, settings=dict(recipe.settings) | {"scheduler": scheduler}),
    )
    fit = KnownFit.by(lambda: key_of_request(request), redo=options.redo)
    return Distillation(request, reporter, fit.work), fit


def lora_training(request: LoraRequest, reporter: Reporter, *, redo: bool) -> LoraDistillation:
    """The training of a LoRA.

    Args:
        redo: what is known of it is forgotten.

    Raises:
        DodeError: it cannot be trained.
    """
    return LoraDistillation(request, reporter, KnownFit.by(lambda: key_of_training(request), redo=redo).work)


def _empty_latent(width: int, height: int) -> torch.Tensor:
    """As the node 'Empty Latent Image' makes it, ``[1, 4, height/8, width/8]``."""
    if min(width, height) < _PIXELS or width % _PIXELS or height % _PIXELS:
        raise DodeError(f"width and height must be multiples of {_PIXELS} pixels, not {width}x{height}")
    return torch.zeros(1, 4, height // _PIXELS, width // _PIXELS)


def _load(checkpoint: Path) -> tuple[ModelPatcher, comfy.sd.CLIP]:
    """The model and its text encoder."""
    embeddings = folder_paths.get_folder_paths("embeddings")
    try:
        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
            str(checkpoint), output_vae=False, output_clip=True, embedding_directory=embeddings
        )
    except Exception as error:  # whatever a file of anybody's makes of ComfyUI's loaders
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DodeError(f"{checkpoint}: ComfyUI cannot load it as a checkpoint: {reason}") from error
    if model is None:
        raise DodeError(f"{checkpoint}: ComfyUI finds no diffusion model in it")
    if clip is None:
        raise DodeError(
            f"{checkpoint}: it has no text encoder, which prompts need. Give a full checkpoint, or use the node "
            "'Distill λ' in ComfyUI with your usual loaders"
        )
    return model, clip


def _encoded(clip: comfy.sd.CLIP, texts: Sequence[str]) -> list[Conditioning]:
    """As the node 'CLIP Text Encode' does."""
    return [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts]
