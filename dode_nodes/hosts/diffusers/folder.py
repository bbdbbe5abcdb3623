"""A diffusers folder for the command line: loaded from this computer, with no code of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ...errors import DodeError
from ...fit.progress import Reporter
from ...fit.recipe import Recipe
from .distill import Distillation, Request


def distillation(options: argparse.Namespace, recipe: Recipe, reporter: Reporter) -> Distillation:
    """What the command's options ask for.

    Raises:
        DodeError: the folder cannot be loaded, or the options do not fit its pipeline.
    """
    width, height = options.size or (None, None)
    size = {} if options.size is None else {"width": width, "height": height}
    request = Request(
        prompts=options.prompt,
        steps=options.steps,
        cfg=options.cfg,
        negative_prompt=options.negative,
        schedule=options.schedule,
        latents=options.latents,
        seed=options.seed,
        micro_batch=options.micro_batch,
        recipe=recipe,
        call=size,
        redo=options.redo,
    )
    return Distillation(load(options.pipeline), request, reporter)


def load(folder: Path) -> DiffusionPipeline:
    """A pipeline of safetensors files in a folder: on the GPU in half precision if there is one.

    Raises:
        DodeError: it cannot be loaded.
    """
    gpu = torch.cuda.is_available()
    try:
        pipe = DiffusionPipeline.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.bfloat16 if gpu else torch.float32,
        )
    except Exception as error:  # whatever a folder of anybody's makes of the loaders
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DodeError(f"{folder}: diffusers cannot load it as a pipeline: {reason}") from error
    if gpu:
        pipe.enable_model_cpu_offload(torch.cuda.current_device())
    return pipe
