"""A WebUI's real server, on the CPU, with the pack as its only extension."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.server import ServerProcess, free_port
from tests.webui_hosts import WebUI, arguments

USER, PASSWORD = "tester", "sesame"
START_SECONDS = 300


class WebUIServer(ServerProcess):
    """Use it as a context manager.

    Args:
        data: its data folder; see ``installed``.

    Attributes:
        url: where it listens.
    """

    def __init__(self, host: WebUI, data: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            host.python, "launch.py", "--skip-prepare-environment", *arguments(host.checkout), "--data-dir", data,
            "--server-name", "127.0.0.1", "--port", str(port), "--api", "--api-auth", f"{USER}:{PASSWORD}",
            "--gradio-allowed-path", host.checkout,  # its style sheet, too
        ]  # fmt: skip
        super().__init__(command, {"HF_HUB_OFFLINE": "1"}, host.checkout, data / "server.log")

    def __enter__(self) -> WebUIServer:
        self.wait(lambda: "Startup time" in self.log, START_SECONDS)
        return self

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
