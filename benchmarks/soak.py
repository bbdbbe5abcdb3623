"""Hundreds of prompts in one ComfyUI: what it holds of memory, threads and files, and whether its latents stay the same.

Prompts of six kinds take turns, each with a new seed: distil, distil with refining, sample, sample through a patched
model, race stock samplers, and a fit that is cancelled; the two quick ones come more often. At the end the same prompts
are run in that process and in a fresh one: latents and tables must be equal to the bit. ComfyUI's history of prompts,
which is its own, is emptied.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from common import command, print_table

from dode_nodes import LambdaTable
from dode_nodes.hosts.comfy.launch import find_comfyui
from tests.server import ComfyServer, Json, errors_of

STEPS = 2
TURNS = tuple(
    kind for slow in ("distil", "refine", "race", "cancel") for kind in (slow, *("sample", "apply") * 2)
)
BUDGETS = {"distil": 0.0, "refine": 8.0}
SECONDS = 1_200
FITTED = {"latents": 4, "scale": 3, "solver": "euler", "scheduler": "karras", "teacher": "dpmpp_2m"}
CONDITIONING = {"model": ["demo", 0], "positive": ["demo", 1], "negative": ["demo", 2], "cfg": 2.0}


class Held(NamedTuple):
    """What a process holds."""

    megabytes: float
    threads: int
    files: int


def held(process: int) -> Held:
    """As the system counts it; memory is what is resident."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    threads, files = (len(os.listdir(f"/proc/{process}/{what}")) for what in ("task", "fd"))
    return Held(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, threads, files)


def node(name: str, /, **inputs: Any) -> Json:
    """A node of a graph in API format."""
    return {"class_type": name, "inputs": inputs}


def demo() -> Json:
    """The demo model and a latent for it."""
    return {
        "demo": node("DODE_DemoModel", kind="eps", digit=3),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=2),
    }


def fit(seed: int, refine_budget: float = 0.0, steps: int = STEPS, **changes: Any) -> Json:
    """Distil λ."""
    options = FITTED | {"cfgs": "", "prediction": "noise", "micro_batch": 0, "refine_budget": refine_budget}
    return demo() | {
        "options": node("DODE_DistillOptions", **(options | changes)),
        "distil": node(
            "DODE_DistillLambdas", **CONDITIONING, latent=["empty", 0], seed=seed, steps=f"{steps}", quality="quick",
            save_name=f"soak-{seed}-{refine_budget:g}", options=["options", 0],
        ),
    }  # fmt: skip


def saved(prompt: Json) -> Json:
    """With the latent of its node "sample" saved."""
    return prompt | {"save": node("SaveLatent", samples=["sample", 0], filename_prefix="soak")}


def sample(seed: int, table: str) -> Json:
    """KSampler (D-ODE) with a table."""
    return saved(
        demo()
        | {
            "table": node("DODE_LoadLambdas", name=table),
            "sample": node(
                "DODE_KSampler", **CONDITIONING, latent_image=["empty", 0], table=["table", 0], seed=seed, steps=STEPS,
                denoise=1.0, solver="any",
            ),
        }
    )  # fmt: skip


def apply(seed: int, table: str) -> Json:
    """Apply λ to model, and ComfyUI's own KSampler."""
    patched = CONDITIONING | {"model": ["patched", 0]}
    return saved(
        demo()
        | {
            "table": node("DODE_LoadLambdas", name=table),
            "patched": node("DODE_ApplyLambdas", model=["demo", 0], table=["table", 0], solver="euler"),
            "sample": node(
                "KSampler", **patched, latent_image=["empty", 0], seed=seed, steps=STEPS, sampler_name="euler",
                scheduler="karras", denoise=1.0,
            ),
        }
    )  # fmt: skip


def race(seed: int) -> Json:
    """Find best stock sampler."""
    return demo() | {
        "race": node("DODE_FindStock", **CONDITIONING, latent=["empty", 0], steps=STEPS, seed=seed),
    }


def run(server: ComfyServer, prompt: Json) -> Json:
    """Its outputs."""
    result = server.run(prompt, SECONDS)
    if result["status"]["status_str"] != "success":
        raise RuntimeError("\n".join(errors_of(result)))
    return result["outputs"]


def cancel(server: ComfyServer, prompt: Json) -> None:
    """Stop it while its teacher runs."""
    logged = len(server.log)
    queued = server.queue(prompt)
    server.wait(lambda: "D-ODE teacher" in server.log[logged:], SECONDS)
    server.post("/interrupt", {})
    kinds = [kind for kind, _ in server.result(queued, SECONDS)["status"]["messages"]]
    if "execution_interrupted" not in kinds:
        raise RuntimeError("a fit was not cancelled")


def distil(server: ComfyServer, seed: int, refine_budget: float) -> LambdaTable:
    """The table that has been saved."""
    run(server, fit(seed, refine_budget))
    (path,) = (server.pack / "lambdas").glob(f"soak-{seed}-{refine_budget:g}-*.safetensors")
    return LambdaTable.load(path)


def latent_of(server: ComfyServer, outputs: Json) -> torch.Tensor:
    """That has been saved."""
    (file,) = outputs["save"]["latents"]
    return safetensors.torch.load_file(server.base / "output" / file["subfolder"] / file["filename"])[
        "latent_tensor"
    ]


def turn(server: ComfyServer, kind: str, seed: int, table: str) -> str:
    """One prompt; the table that the next ones sample with."""
    if kind in BUDGETS:
        return f"{distil(server, seed, BUDGETS[kind]).name}.safetensors"
    if kind == "cancel":
        cancel(server, fit(seed, latents=64, steps=12, scale=100))
    else:
        run(server, race(seed) if kind == "race" else {"sample": sample, "apply": apply}[kind](seed, table))
    return table


def soak(server: ComfyServer, prompts: int, every: int) -> Iterator[list[object]]:
    """What it holds after so many prompts."""
    table = "demo_eps.safetensors"
    for number in range(prompts):
        table = turn(server, TURNS[number % len(TURNS)], number, table)
        if (number + 1) % every == 0 or number + 1 == prompts:
            server.post("/history", {"clear": True})
            now = held(server.pid)
            yield [number + 1, f"{now.megabytes:.1f}", now.threads, now.files]


def always_the_same(server: ComfyServer) -> list[bytes]:
    """What prompts that no other had before have made: two tables and two latents, as bytes."""
    seed = 10**6
    tables = [distil(server, seed, budget) for budget in BUDGETS.values()]
    made = [table.sha256.encode() for table in tables]
    for prompt in (sample(seed, "demo_eps.safetensors"), apply(seed, f"{tables[0].name}.safetensors")):
        made.append(latent_of(server, run(server, prompt)).numpy().tobytes())
    return made


def main() -> None:
    """Soak, then compare with a fresh process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--every", type=int, default=len(TURNS), help="prompts between two looks")
    options = parser.parse_args()
    checkout = find_comfyui()
    if checkout is None:
        raise SystemExit("set COMFYUI_PATH to a checkout of ComfyUI")
    print(f"{command()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as old, tempfile.TemporaryDirectory() as new:
        with ComfyServer(checkout, Path(old)) as server:
            print_table(
                ["prompts", "MB", "threads", "open files"], soak(server, options.prompts, options.every)
            )
            worn = always_the_same(server)
        with ComfyServer(checkout, Path(new)) as server:
            fresh = always_the_same(server)
    print(f"\nTwo tables and two latents equal to a fresh process's to the bit: {worn == fresh}")


if __name__ == "__main__":
    main()
