"""The same tests in every other ComfyUI of this machine, each by its own Python."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable

import pytest

from tests.comfyui_hosts import HERE, HOSTS, Host
from tests.import_comfyui import REPOSITORY

pytestmark = [pytest.mark.comfyui, pytest.mark.slow_host]

WHICH = "comfyui and not browser and not slow_host"
NEEDS = "pytest hypothesis matplotlib"
SECONDS = 5000


@pytest.mark.parametrize("host", [host for host in HOSTS if host != HERE] or [None], ids=str)
def test_all_passes_there(host: Host | None, record_property: Callable[[str, object], None]) -> None:
    if host is None:
        pytest.skip("no second ComfyUI")
    environment = os.environ | {"COMFYUI_PATH": str(host.checkout), "OMP_NUM_THREADS": "1"}
    environment.pop("COMFYUI_PATHS", None)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [host.python, *arguments],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip

    lacking = run("-c", f"import {NEEDS.replace(' ', ', ')}").returncode
    assert not lacking, f"{host}, its Python lacks what the tests need: {host.python} -m pip install {NEEDS}"
    done = run("-m", "pytest", "tests/hosts/comfy", "-m", WHICH, "-p", "no:cacheprovider", "--tb=short")
    counts = re.findall(r"^.*\d+ (?:passed|failed|errors?)\b.*$", done.stdout, re.M)
    record_property(str(host), counts[-1] if counts else "no test has run")
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
