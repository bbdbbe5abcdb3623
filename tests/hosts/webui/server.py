"""A WebUI's real server, on the CPU, with the pack as its only extension."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.webui_hosts import WebUI, arguments

USER, PASSWORD = "tester", "sesame"
START_SECONDS = 300


class WebUIServer:
    """Use it as a context manager.

    Args:
        data: its data folder; see ``installed``.

    Attributes:
        url: where it listens.
    """

    def __init__(self, host: WebUI, data: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = data / "server.log"
        command = [
            host.python, "launch.py", "--skip-prepare-environment", *arguments(host.checkout), "--data-dir", data,
            "--server-name", "127.0.0.1", "--port", str(port), "--api", "--api-auth", f"{USER}:{PASSWORD}",
            "--gradio-allowed-path", host.checkout,  # its style sheet, too
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=host.checkout
            )

    def __enter__(self) -> WebUIServer:
        self.wait(lambda: "Startup time" in self.log, START_SECONDS)
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def post(self, path: str, content: Any, password: str | None = PASSWORD) -> tuple[int, Any]:
        """POST JSON; the status and the reply."""
        headers = {"Content-Type": "application/json"}
        if password is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(f"{USER}:{password}".encode()).decode()
        request = urllib.request.Request(self.url + path, json.dumps(content).encode(), headers)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:  # noqa: S310
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def wait(self, what: Callable[[], Any], seconds: float) -> None:
        """Until it is true."""
        end = time.monotonic() + seconds
        while not what():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the WebUI has ended or hangs:\n{self.log[-5000:]}")
            time.sleep(0.1)
