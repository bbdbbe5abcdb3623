"""The extension in every WebUI of this machine: tests run by its own Python, and pictures against ComfyUI's."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.checkpoints import write_sd15
from tests.hosts.webui.installed import data_folder, pytest_folder
from tests.import_comfyui import REPOSITORY
from tests.webui_hosts import WEBUIS, WebUI

SECONDS = 1500


@pytest.fixture(scope="module")
def checkpoint(comfyui: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    write_sd15(path, for_webui=True)
    return path


@pytest.fixture(scope="module", params=WEBUIS or [None], ids=str)
def tested(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What came of the tests in a host."""
    host: WebUI | None = request.param
    if host is None:
        pytest.skip("no WebUI: set WEBUI_PATHS")
    data = data_folder(host, tmp_path_factory.mktemp("webui"), request.getfixturevalue("checkpoint"))
    environment = os.environ | {
        "DODE_WEBUI_CHECKOUT": str(host.checkout), "DODE_WEBUI_DATA": str(data), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(pytest_folder(data)),
    }  # fmt: skip
    done = subprocess.run(
        [host.python, "-m", "pytest", REPOSITORY / "tests/hosts/webui/in_host", "-c", data / "pytest.ini",
         "--rootdir", REPOSITORY / "tests/hosts/webui/in_host", "--confcutdir",
         REPOSITORY / "tests/hosts/webui/in_host", "-q", "--tb=short", "--durations=8"],
        cwd=data, env=environment, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    return SimpleNamespace(host=host, data=data, done=done)


def test_all_passes_there(tested: SimpleNamespace, record_property: Callable[[str, object], None]) -> None:
    counts = re.findall(r"^.*\d+ (?:passed|failed|errors?)\b.*$", tested.done.stdout, re.M)
    versions = re.findall(r"^with .*$", tested.done.stdout, re.M)
    record_property(str(tested.host), ", ".join([*counts[-1:], *versions]) or "no test has run")
    assert tested.done.returncode == 0, tested.done.stdout[-20000:] + tested.done.stderr[-5000:]


@pytest.mark.comfyui
@pytest.mark.parametrize("steps", [4, 6])
def test_latents_are_those_of_comfyuis_node(
    steps: int, tested: SimpleNamespace, checkpoint: Path, run_node: Any, pack: Any
) -> None:
    import comfy.sd

    from dode_nodes import LambdaTable

    there = torch.load(tested.data / "pictures.pt")[str(steps)]
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_clip=True)
    conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a cat", "a dog")]
    (here,) = run_node(
        pack.DodeKSampler, model=model, positive=conds[0], negative=conds[1], seed=3, steps=steps, cfg=5.0, denoise=1.0,
        latent_image={"samples": torch.zeros(1, 4, 8, 8)}, table=LambdaTable.load(tested.data / "same.safetensors"),
        solver="any",
    )  # fmt: skip
    mine = model.model.process_latent_in(here["samples"])
    error = (mine - there).square().mean().sqrt() / mine.square().mean().sqrt()
    assert error < 1e-4


def test_installing_changes_nothing(tested: SimpleNamespace) -> None:
    """The host runs it at every start."""
    packages = Path(tested.host.python).parents[1] / "lib"
    before = sorted(packages.glob("*/site-packages/*"))
    code = (
        "import runpy, sys; runpy.run_path('install.py', run_name='__main__'); "
        "print(*{'pip', 'subprocess'} & {*sys.modules})"
    )
    done = subprocess.run(
        [tested.host.python, "-c", code], cwd=tested.data / "extensions" / "dode-nodes", capture_output=True, text=True
    )  # fmt: skip
    assert done.stdout == "D-ODE nodes: everything it needs is here\n\n", done.stderr
    assert sorted(packages.glob("*/site-packages/*")) == before
