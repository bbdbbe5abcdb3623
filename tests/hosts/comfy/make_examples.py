"""Makes the λ tables of the demo models, and the example workflows and their thumbnails.

python -m tests.hosts.comfy.make_examples tables       # lambdas/demo_*.safetensors, by the node Distill λ
python -m tests.hosts.comfy.make_examples workflows    # example_workflows/*, by the front end in Chromium
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.browser import node_environment
from tests.comfyui import REPOSITORY, find_comfyui
from tests.server import ComfyServer, errors_of

DIGITS = (2, 3, 5, 8)
SCHEDULERS = {"eps": "karras", "flow": "simple"}
SCRIPT = Path(__file__).parent / "browser" / "make_examples.mjs"


def table_prompt(kind: str) -> dict[str, Any]:
    """The graph that distils a demo model's table."""
    digits = {
        f"digit {digit}": {"class_type": "DODE_DemoModel", "inputs": {"kind": kind, "digit": digit}}
        for digit in DIGITS
    }
    first, second, third, fourth = digits
    empty = {"width": 64, "height": 64, "batch_size": 1}
    distil = {
        "model": [first, 0], "positive": [first, 1], "negative": [first, 2], "cfg": 2.0, "latent": ["empty", 0],
        "positive_2": [second, 1], "positive_3": [third, 1], "positive_4": [fourth, 1],
        "latents": 64, "seed": 0, "solver": "euler", "scheduler": SCHEDULERS[kind],
        "steps": "4, 5, 6, 8, 10, 12", "scale": 10, "teacher": "dpmpp_2m", "prediction": "auto",
        "micro_batch": 0, "save_name": f"demo_{kind}",
    }  # fmt: skip
    return digits | {
        "empty": {"class_type": "EmptyLatentImage", "inputs": empty},
        "distil": {"class_type": "DODE_DistillLambdas", "inputs": distil},
    }


def make_tables(server: ComfyServer) -> None:
    """Distil both demo models."""
    for kind in SCHEDULERS:
        name = f"demo_{kind}.safetensors"
        (server.pack / "lambdas" / name).unlink(missing_ok=True)
        result = server.run(table_prompt(kind), seconds=1800)
        assert not errors_of(result), errors_of(result)
        shutil.copy(server.pack / "lambdas" / name, REPOSITORY / "lambdas" / name)


def make_workflows(server: ComfyServer) -> None:
    """Build, run and photograph the examples."""
    target = REPOSITORY / "example_workflows"
    target.mkdir(exist_ok=True)
    subprocess.run(["node", SCRIPT, server.url, target], env=node_environment(), check=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["tables", "workflows"])
    what = parser.parse_args().what
    with tempfile.TemporaryDirectory() as base, ComfyServer(find_comfyui(), Path(base)) as server:
        (make_tables if what == "tables" else make_workflows)(server)


if __name__ == "__main__":
    main()
