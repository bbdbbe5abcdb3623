"""The extension in a real server: over its API, and on its page."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dode_nodes import LambdaRow, LambdaTable
from dode_nodes.sampling.schedules import NoiseSchedule, make_sigmas
from tests import browser
from tests.checkpoints import write_sd15
from tests.hosts.webui.installed import data_folder
from tests.hosts.webui.server import WebUIServer
from tests.webui_hosts import WEBUIS

pytestmark = pytest.mark.comfyui  # its classes name what is in the checkpoint

SCRIPT = Path(__file__).parent / "browser" / "check.mjs"
ROUTE = "/dode/v1/distil"
PICTURE = {
    "prompt": "a cat", "negative_prompt": "a dog", "steps": 5, "width": 64, "height": 64, "cfg_scale": 5, "seed": 3,
    "sampler_name": "D-ODE",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(comfyui: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUIServer]:
    if not WEBUIS:
        pytest.skip("no WebUI: set WEBUI_PATHS")
    base = tmp_path_factory.mktemp("webui")
    write_sd15(base / "checkpoint.safetensors", for_webui=True)
    data = data_folder(WEBUIS[0], base / "data", base / "checkpoint.safetensors")
    tables = data / "models" / "lambdas"
    tables.mkdir()
    for name, lam in (("mine", 0.3), ("<img src=x onerror=alert(1)>", -0.3)):
        LambdaTable([_row(lam)], model={"family": "sd15"}).save(tables / f"{name}.safetensors")
    with WebUIServer(WEBUIS[0], data) as running:
        yield running


def _row(lam: float) -> LambdaRow:
    sigmas = make_sigmas("karras", 4, NoiseSchedule.stable_diffusion()).double().numpy()
    return LambdaRow("euler", sigmas, (1,) * 4, np.array([0.0, lam, lam, lam]), settings={"cfg": 5.0})


def _infotext(server: WebUIServer, **changes: Any) -> str:
    status, reply = server.post("/sdapi/v1/txt2img", PICTURE | changes)
    assert status == 200, reply
    text: str = json.loads(reply["info"])["infotexts"][0]
    return text


def test_the_api_takes_a_table_by_name_and_auto_where_it_is_left_out(server):
    digits = LambdaTable([_row(0.3)]).sha256[:8]
    named = _infotext(server, alwayson_scripts={"D-ODE": {"args": ["mine"]}})
    assert "Steps: 4, Sampler: D-ODE" in named
    assert f"D-ODE table: mine {digits}" in named
    assert f"D-ODE table: mine {digits}" in _infotext(server)
    stock = _infotext(server, alwayson_scripts={"D-ODE": {"args": ["none"]}})
    assert "D-ODE table: none, D-ODE fallback: DPM++ 2M" in stock


@pytest.mark.parametrize("password", [None, "wrong", ""])
def test_the_route_needs_the_hosts_password(password, server):
    assert server.post(ROUTE, {"prompts": ["a cat"]}, password=password)[0] == 401


def test_the_route_says_what_cannot_be(server):
    status, reply = server.post(ROUTE, {"prompts": ["a cat"], "name": "../out"})
    assert (status, reply["detail"][:29]) == (400, "give the table another name t")
    assert server.post(ROUTE, {"prompts": "a cat"})[0] == 422


@pytest.mark.browser
def test_the_page(server, tmp_path):
    """Paste, generate, send to txt2img and to img2img, distil. Screenshots go to $DODE_SCREENSHOTS, if that is set."""
    if lacking := browser.missing():
        pytest.skip(f"no browser tests: {lacking}")
    screenshots = Path(os.environ.get("DODE_SCREENSHOTS") or tmp_path)
    digits = LambdaTable([_row(0.3)]).sha256[:8]
    infotext = (
        "a cat,\nasleep\nNegative prompt: a dog\nSteps: 4, Sampler: D-ODE, Schedule type: Automatic, CFG scale: 5, "
        f"Seed: 3, Size: 64x64, D-ODE table: mine {digits}"
    )
    done = subprocess.run(
        ["node", SCRIPT], text=True, capture_output=True, timeout=300, env=browser.node_environment(),
        input=json.dumps({"url": server.url, "screenshots": str(screenshots), "infotext": infotext}),
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr}\n{server.log[-3000:]}"
    report = json.loads(done.stdout)
    assert report["pasted"] == {
        "prompt": "a cat,\nasleep", "sampler": "D-ODE", "steps": "4", "table": f"mine {digits}",
    }  # fmt: skip
    assert f"D-ODE table: mine {digits}" in report["generated"]
    assert "It runs euler, 4 steps" in report["generated"]
    first, again = (Image.open(io.BytesIO(base64.b64decode(file))) for file in report["files"])
    assert again.info == first.info
    difference = np.asarray(again, dtype=int) - np.asarray(first)
    assert np.abs(difference).max() <= 1  # a CPU rounds a picture one way or the other
    assert report["sent"] == {"steps": "4", "table": f"mine {digits}"}
    assert f"D-ODE table: mine {digits}" in report["repainted"]
    assert "It runs euler, 4 steps" in report["repainted"]
    assert report["taken"] == {
        "prompts": "a cat, asleep", "negative": "a dog", "cfg": "5", "width": "64", "height": "64", "steps": "4",
    }  # fmt: skip
    assert "evaluations: teacher" in report["began"]
    assert report["ended"].endswith("it was interrupted")
    assert report["markup"] == 0
    assert report["errors"] == []
    assert torch.tensor([size > 20_000 for size in report["sizes"]]).all()


def test_a_table_is_made_over_the_api_and_taken(server):
    request = {"prompts": ["a cat"], "negative_prompt": "a dog", "cfg_scale": 5, "width": 16, "height": 16}
    status, reply = server.post(ROUTE, request | {"steps": "2", "quality": "quick", "name": "made"})
    assert status == 200, reply
    assert reply["table"].startswith("made")
    assert reply["ended_early"] == ""
    assert reply["lines"][0].startswith("at most ")
    text = _infotext(server, steps=2)
    assert "Steps: 2, Sampler: D-ODE" in text
    assert f"D-ODE table: {reply['table']} " in text
