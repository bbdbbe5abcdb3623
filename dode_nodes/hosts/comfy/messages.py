"""Messages to the user, on the node and in the log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from ...tables.describe import printable

_DROP_SECONDS = 0.6
"""The front end's delay is 0.4 s."""
_AS_TEXT = str.maketrans({"<": "‹", ">": "›", "&": "＆"})
"""ComfyUI's front-end shows progress text as HTML, and a table's words may be a stranger's."""


def show_text(node_id: str | None, text: str) -> None:
    """Show a line on a node, as text: nothing in it is markup."""
    server = _server()
    if server is not None and node_id is not None:
        server.send_progress_text(printable(text).translate(_AS_TEXT), node_id)


def drop_preview(node_id: str | None) -> None:
    """Let a node's output be seen in place of its last live preview.

    Front ends from 1.27 to 1.58 prefer a preview to an output until the node starts anew, which they see by its absence
    from one state of the progress and its presence in the next. They drop it with a delay, and do not look again at an
    output that comes before.
    """
    server = _server()
    if server is None or node_id is None:
        return
    from comfy_execution.progress import get_progress_state

    registry = get_progress_state()
    if (state := registry.nodes.get(node_id)) is not None:
        server.send_sync("progress_state", {"prompt_id": registry.prompt_id, "nodes": {}}, server.client_id)
        registry.update_progress(node_id, state["value"], state["max"], None)
        time.sleep(_DROP_SECONDS)


def _server() -> Any:
    module = sys.modules.get("server")  # not loaded where ComfyUI is used as a library
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def remark(node_id: str | None, remarks: Iterable[str], told: str = "") -> None:
    """Warn in the log, and show on the node, in one line, all that has been remarked there in this run of the graph.

    Args:
        told: what else is to be shown; before the remarks.
    """
    new = [text for each in remarks if (text := printable(each))]
    if new:
        logging.warning("D-ODE: %s", "; ".join(new))
    if shown := [*filter(None, [told]), *_said.so_far(node_id, new)]:
        show_text(node_id, "; ".join(shown))


class _Said:
    """What was remarked on each node since a prompt began: a node has one line, which each text replaces."""

    def __init__(self) -> None:
        self._prompt: str | None = None
        self._on: dict[str | None, dict[str, None]] = {}

    def so_far(self, node_id: str | None, new: Sequence[str]) -> list[str]:
        """With these added; nothing twice. Where nobody says which prompt runs, nothing is kept."""
        prompt = getattr(_server(), "last_prompt_id", None)
        if prompt is None or prompt != self._prompt:
            self._prompt, self._on = prompt, {}
        said = self._on.setdefault(node_id, {})
        said.update(dict.fromkeys(new))
        return list(said)


_said = _Said()
