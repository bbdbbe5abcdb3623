"""A real ComfyUI server in a process of its own, with the pack in its custom_nodes, and its HTTP API."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.import_comfyui import REPOSITORY

PACK = "dode-nodes"
PACK_CONTENTS = ("__init__.py", "dode_nodes", "example_workflows", "lambdas", "locales", "web")
START_SECONDS = 120
RUN_SECONDS = 120

Json = dict[str, Any]


class ServerProcess:
    """A server in a process of its own, ended with the ``with`` statement.

    Args:
        command, environment, cwd: how it is started; of the environment what is added to this process's.
        log: the file that it prints to.
    """

    def __init__(self, command: list[Any], environment: dict[str, str], cwd: Path, log: Path) -> None:
        self._log = log
        whole = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
        with self._log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=whole, cwd=cwd
            )

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait(self, what: Callable[[], Any], seconds: float) -> Any:
        """What ``what`` returns once it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"it ended with status {self._process.returncode}:\n{self.log}")
            if value := what():
                return value
            time.sleep(0.05)
        raise TimeoutError(f"nothing after {seconds} s; its log:\n{self.log[-5000:]}")


class ComfyServer(ServerProcess):
    """ComfyUI, started headless on the CPU over a folder of its own; use it as a context manager.

    Attributes:
        base: the base directory: custom_nodes, models, input, output.
        url: where it listens.
    """

    def __init__(self, checkout: Path, base: Path) -> None:
        self.base = base
        self.url = f"http://127.0.0.1:{free_port()}"
        install_pack(base / "custom_nodes")
        command = [
            sys.executable, checkout / "main.py", "--cpu", "--base-directory", base,
            "--listen", "127.0.0.1", "--port", self.url.rpartition(":")[2],
            "--disable-api-nodes", "--database-url", "sqlite:///:memory:", "--preview-method", "latent2rgb",
        ]  # fmt: skip
        super().__init__(command, without_installed_copy(base / "site"), base, base / "server.log")

    def __enter__(self) -> ComfyServer:
        try:
            self.wait(self._is_up, START_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def pack(self) -> Path:
        """The installed copy of the pack."""
        return self.base / "custom_nodes" / PACK

    def get(self, path: str) -> Any:
        """GET, as JSON."""
        return self._request(path, None)[1]

    def post(self, path: str, content: Json) -> tuple[int, Any]:
        """POST JSON; the status and the reply."""
        return self._request(path, content)

    def queue(self, prompt: Json) -> str:
        """Queue a graph in API format; its id."""
        status, reply = self.post("/prompt", {"prompt": prompt})
        assert status == 200, json.dumps(reply, indent=1)
        return reply["prompt_id"]

    def result(self, prompt_id: str, seconds: float = RUN_SECONDS) -> Json:
        """Wait for a queued graph; its entry in the history."""
        return self.wait(lambda: self.get(f"/history/{prompt_id}").get(prompt_id), seconds)

    def run(self, prompt: Json, seconds: float = RUN_SECONDS) -> Json:
        """Queue, wait."""
        return self.result(self.queue(prompt), seconds)

    def picture(self, picture: Json) -> bytes:
        """The file behind an entry of a node's ``images``."""
        query = "&".join(f"{key}={picture[key]}" for key in ("filename", "subfolder", "type"))
        with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=30) as reply:  # noqa: S310
            return reply.read()

    def _is_up(self) -> bool:
        try:
            return bool(self.get("/system_stats"))
        except OSError:
            return False

    def _request(self, path: str, content: Json | None) -> tuple[int, Any]:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(  # noqa: S310
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
                text = reply.read()
                return reply.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


def without_installed_copy(folder: Path) -> dict[str, str]:
    """The environment of a Python that has no package of ours, as a user's: here it may be installed."""
    folder.mkdir()
    hide = """import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "dode_nodes":
            raise ModuleNotFoundError(f"No module named {name!r}: it is hidden, as users have none", name=name)
sys.meta_path.insert(0, Hidden())
"""
    (folder / "sitecustomize.py").write_text(hide, encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


def install_pack(custom_nodes: Path) -> Path:
    """Copy what a user installs, so that nothing is written to the repository."""
    target = custom_nodes / PACK
    target.mkdir(parents=True)
    for name in PACK_CONTENTS:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target)
    return target


def errors_of(result: Json) -> list[str]:
    """The messages of nodes that failed, in a graph's history entry."""
    return [
        message["exception_message"]
        for kind, message in result["status"]["messages"]
        if kind == "execution_error"
    ]


def free_port() -> int:
    """One that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
