"""Makes the example workflows with thumbnails, and the help pages' pictures.

python -m tests.hosts.comfy.make_examples workflows [NAME ...]    # example_workflows/*, by the front end in Chromium
python -m tests.hosts.comfy.make_examples help         # web/docs/assets/*, by Inspect and Compare
"""

from __future__ import annotations

import argparse
import io
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dode_nodes.hosts.comfy.launch import find_comfyui
from tests.browser import node_environment
from tests.import_comfyui import REPOSITORY
from tests.server import ComfyServer

EMPTY = {"width": 64, "height": 64, "batch_size": 1}
THUMBNAIL_WIDTH = 1000
SCRIPT = Path(__file__).parent / "browser" / "make_examples.mjs"


def make_workflows(server: ComfyServer, names: Sequence[str] = ()) -> None:
    """Build, run and photograph the examples of these names, or all."""
    target = REPOSITORY / "example_workflows"
    target.mkdir(exist_ok=True)
    pictures = server.base / "pictures"
    pictures.mkdir()
    subprocess.run(["node", SCRIPT, server.url, target, pictures, *names], env=node_environment(), check=True)
    for picture in pictures.iterdir():
        with Image.open(picture) as image:
            size = (THUMBNAIL_WIDTH, round(image.height * THUMBNAIL_WIDTH / image.width))
            thumbnail = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        thumbnail.save(target / f"{picture.stem}.jpg", quality=85)


def make_help_pictures(server: ComfyServer) -> None:
    """A report and a comparison, of the shipped table."""
    compare = {
        "model": ["demo", 0], "positive": ["demo", 1], "negative": ["demo", 2], "vae": ["demo", 3], "cfg": 2.0,
        "latent": ["empty", 0], "table": ["table", 0], "steps": 5, "solver": "any", "pictures": 8, "seed": 1,
        "scale": 10,
    }  # fmt: skip
    prompt = {
        "demo": {"class_type": "DODE_DemoModel", "inputs": {"kind": "eps", "digit": 3}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": EMPTY},
        "table": {"class_type": "DODE_LoadLambdas", "inputs": {"name": "demo_eps.safetensors"}},
        "report": {"class_type": "DODE_InspectLambdas", "inputs": {"table": ["table", 0]}},
        "comparison": {"class_type": "DODE_Compare", "inputs": compare},
    }
    outputs = server.run(prompt)["outputs"]
    target = REPOSITORY / "web" / "docs" / "assets"
    target.mkdir(exist_ok=True)
    for name in ("report", "comparison"):
        with Image.open(io.BytesIO(server.picture(outputs[name]["images"][0]))) as image:
            few_colours = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        few_colours.save(target / f"{name}.png", optimize=True)


MAKERS = {"workflows": make_workflows, "help": make_help_pictures}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=MAKERS)
    parser.add_argument("names", nargs="*", help="of workflows; without, all of them")
    options = parser.parse_args()
    if options.names and options.what != "workflows":
        parser.error(f"{options.what} takes no names")
    with tempfile.TemporaryDirectory() as base, ComfyServer(find_comfyui(), Path(base)) as server:
        if options.names:
            make_workflows(server, options.names)
        else:
            MAKERS[options.what](server)


if __name__ == "__main__":
    main()
