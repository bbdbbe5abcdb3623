"""A ComfyUI without its server, started anew: what it is like with some packs loaded, as JSON, a line for each choice.

python host_process.py CHECKOUT BASE_DIRECTORY PACK_FOLDER[,PACK_FOLDER...] ...    # they are loaded in this order
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

STOCK = ("euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2m", "ipndm", "uni_pc")


def start(checkout: str, base: str) -> None:
    """Import ComfyUI as its main.py does, with the model paths of BASE_DIRECTORY/paths.yaml if there is one."""
    sys.path.insert(0, checkout)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.base_directory = base
    from utils.extra_config import load_extra_path_config  # before nodes, which hides this utils by another

    paths = Path(base) / "paths.yaml"
    if paths.exists():
        comfy.cli_args.args.extra_model_paths_config = [[str(paths)]]
        load_extra_path_config(str(paths))
    import nodes  # noqa: F401


def closed_form_model() -> Any:
    """A model whose denoised is a function of x and σ that needs no weights."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base
    import torch

    class Config(comfy.supported_models_base.BASE):
        latent_format = comfy.latent_formats.SD15
        memory_usage_factor = 0.01

        def __init__(self) -> None:
            super().__init__({"disable_unet_model_creation": True, "in_channels": 4})

    class Model(comfy.model_base.BaseModel):
        def _apply_model(self, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            sigma = t.reshape(-1, 1, 1, 1)
            return torch.tanh(x / (1 + sigma)) / (1 + 0.1 * sigma)

    model = Model(Config(), comfy.model_base.ModelType.EPS)
    model.diffusion_model = torch.nn.Linear(4, 4)
    model.diffusion_model.dtype = torch.float32
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def sample_stock(model: Any, sampler: str) -> Any:
    """A stock KSampler's latent."""
    import comfy.sample
    import torch

    latent = torch.zeros(2, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 1)
    return comfy.sample.sample(
        model, noise, 6, 2.0, sampler, "karras", conditioning(0.1), conditioning(0.0), latent,
        disable_pbar=True, seed=1,
    )  # fmt: skip


def conditioning(value: float) -> list[Any]:
    import torch

    return [[torch.full((1, 1, 4), value), {}]]


def distil_and_sample(model: Any) -> dict[str, Any]:
    """The pack's nodes, as ComfyUI calls them: distil, sample, and sample through the patched model."""
    import nodes
    import torch

    def call(name: str, **inputs: Any) -> tuple[Any, ...]:
        node = nodes.NODE_CLASS_MAPPINGS[name]
        hidden = {"UNIQUE_ID": "1"}
        prepared = node.PREPARE_CLASS_CLONE(hidden | {"hidden_inputs": hidden})  # 0.3.64 | newer ones
        return prepared.EXECUTE_NORMALIZED(**inputs).args

    conds = {"positive": conditioning(0.1), "negative": conditioning(0.0), "cfg": 2.0}
    (options,) = call(
        "DODE_DistillOptions", cfgs="", latents=4, refine_budget=0.0, solver="euler", scheduler="karras",
        teacher="dpmpp_2m", scale=4, prediction="noise", micro_batch=0,
    )  # fmt: skip
    table, *_, summary = call(
        "DODE_DistillLambdas", model=model, **conds, latent={"samples": torch.zeros(1, 4, 8, 8)}, seed=0,
        steps="6", quality="quick", save_name="host_process", options=options,
    )  # fmt: skip
    (result,) = call(
        "DODE_KSampler", model=model, **conds, seed=1, steps=6, denoise=1.0, table=table, solver="any",
        latent_image={"samples": torch.zeros(2, 4, 8, 8)},
    )  # fmt: skip
    (patched,) = call("DODE_ApplyLambdas", model=model, table=table, solver="any")
    by_patch, stock = sample_stock(patched, "euler"), sample_stock(model, "euler")
    return {
        "lambdas": list(table.rows[0].weights),
        "saved": summary.splitlines()[0].removeprefix("Saved as "),
        "patched is sampler": bool(torch.allclose(by_patch, result["samples"], atol=1e-5)),
        "changed": float((result["samples"] - stock).abs().max()),
    }


def report(packs: list[str]) -> dict[str, Any]:
    """Load them and look."""
    import comfy.k_diffusion.sampling
    import comfy.samplers
    import folder_paths
    import nodes
    import torch

    before = set(sys.modules)
    loaded = [asyncio.run(nodes.load_custom_node(pack)) for pack in packs]
    imported = set(sys.modules) - before
    with torch.inference_mode():
        model = closed_form_model()
        latents = {name: sample_stock(model, name) for name in STOCK}
        lambdas = folder_paths.folder_names_and_paths.get("lambdas")
        return {
            "loaded": loaded,
            "imported": sorted(imported),
            "samplers": comfy.samplers.SAMPLER_NAMES,
            "schedulers": comfy.samplers.SCHEDULER_NAMES,
            "k_diffusion": sorted(
                name for name in vars(comfy.k_diffusion.sampling) if not name.startswith("__")
            ),
            "latents": {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in latents.items()},
            "lambdas": lambdas and [lambdas[0], sorted(lambdas[1])],
            "ours": distil_and_sample(model) if "DODE_DistillLambdas" in nodes.NODE_CLASS_MAPPINGS else None,
        }


def main(checkout: str, base: str, *choices: str) -> None:
    """Start it once. Every choice has a copy of it that has loaded no other."""
    start(checkout, base)
    for packs in choices:
        print(flush=True)  # its copy would print again what is still to be written
        if (copy := os.fork()) == 0:
            print(json.dumps(report(packs.split(","))), flush=True)
            os._exit(0)
        _, status = os.waitpid(copy, 0)
        if status:
            sys.exit(1)  # it has said why


if __name__ == "__main__":
    main(*sys.argv[1:])
