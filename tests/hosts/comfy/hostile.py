"""A stranger's table with markup, formulas and turned writing in every text, and a graph of every node for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dode_nodes import LambdaTable
from dode_nodes.tables.provenance import Credit, Lora
from tests.server import ComfyServer
from tests.tables import rows

MARKUP = "<img src=x onerror=ran.push(1)><marquee>$\\frac{1}{$</marquee>"
TURNED = "\u202e\u2066\x1b[2J" + MARKUP
NAME = "<img src=x onerror=ran.push(2)> $x^{$"


@contextmanager
def hostile_tables(server: ComfyServer) -> Iterator[tuple[str, str]]:
    """A table with all that passes the gate, and one with what does not; their names."""
    folder = server.pack / "lambdas"
    demo = LambdaTable.load(folder / "demo_eps.safetensors")
    facts: dict[str, Any] = {
        "model": dict(demo.model) | {"name": MARKUP, TURNED: TURNED},
        TURNED: TURNED,
        "rows": [],
    }
    arrays = {}
    for i, row in enumerate(demo.rows):
        odd = row.to_json() | {
            "credit": Credit(MARKUP, MARKUP, f"{MARKUP}\n{MARKUP}", "2026-01-31").to_json(),
            "loras": [Lora("0" * 64, 1.0, MARKUP).to_json()],
            TURNED: TURNED,
        }
        odd["settings"] = odd["settings"] | {"prompt": TURNED, TURNED: [TURNED]}
        odd["report"] = odd["report"] | {TURNED: TURNED}
        facts["rows"].append(odd if i else odd | {"solver": "<marquee>"})
        arrays |= {f"rows.{i}.{name}": array for name, array in row.arrays().items()}
    rows.write(folder / f"{NAME}.safetensors", facts, arrays)
    facts["rows"][0]["solver"] = TURNED
    rows.write(folder / f"refused {NAME}.safetensors", facts, arrays)
    names = f"{NAME}.safetensors", f"refused {NAME}.safetensors"
    try:
        yield names
    finally:
        for name in names:
            (folder / name).unlink()


def graph(name: str) -> dict[str, Any]:
    """Every node that a table goes through."""
    prompts = {"positive": ["1", 1], "negative": ["1", 2]}
    auto = {"family_match": True, "preset": ""}
    sampling = {"model": ["1", 0], "seed": 5, "steps": 6, "cfg": 2.0, "denoise": 1.0, "solver": "any", **auto}
    sampling |= prompts | {"latent_image": ["2", 0]}
    plain = {
        "seed": 5,
        "steps": 6,
        "cfg": 2.0,
        "sampler_name": "euler",
        "scheduler": "karras",
        "denoise": 1.0,
    }
    nodes = {
        "1": ("DODE_DemoModel", {"kind": "eps", "digit": 3}),
        "2": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "3": ("DODE_LoadLambdas", {"name": name, "model": ["1", 0], **auto}),
        "4": ("DODE_InspectLambdas", {"table": ["3", 0]}),
        "5": ("DODE_KSampler", sampling | {"table": ["3", 0]}),
        "6": ("DODE_KSampler", sampling | {"seed": 6}),
        "7": ("DODE_ApplyLambdas", {"model": ["1", 0], "table": ["3", 0], "solver": "any", **auto}),
        "8": ("KSampler", plain | prompts | {"model": ["7", 0], "latent_image": ["2", 0]}),
        "9": ("DODE_SaveLambdas", {"table": ["3", 0], "save_name": "kept", "rows": "", "author": "", "licence": "",
                                   "notes": "", "model_name": ""}),
        "10": ("DODE_Compare", {"model": ["1", 0], "cfg": 2.0, "latent": ["2", 0], "table": ["3", 0], "steps": 6,
                                "solver": "any", "pictures": 1, "seed": 9, "scale": 2, **prompts}),
        "11": ("PreviewAny", {"source": ["4", 1]}),
        "12": ("PreviewAny", {"source": ["9", 1]}),
        "13": ("SaveLatent", {"samples": ["5", 0], "filename_prefix": "x"}),
        "14": ("SaveLatent", {"samples": ["6", 0], "filename_prefix": "x"}),
        "15": ("SaveLatent", {"samples": ["8", 0], "filename_prefix": "x"}),
        "16": ("DODE_Sampler", {"table": ["3", 0], "solver": "any"}),
        "17": ("DODE_Sigmas", {"table": ["3", 0], "steps": 6, "denoise": 1.0, "solver": "any"}),
        "18": ("SamplerCustom", {"model": ["1", 0], "add_noise": True, "noise_seed": 7, "cfg": 2.0, "sampler": ["16", 0],
                                 "sigmas": ["17", 0], "latent_image": ["2", 0], **prompts}),
        "19": ("SaveLatent", {"samples": ["18", 0], "filename_prefix": "x"}),
    }  # fmt: skip
    return {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}
