"""Messages to the user, on the node and in the log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

from ...tables.describe import printable

_AS_TEXT = str.maketrans({"<": "‹", ">": "›", "&": "＆"})
"""ComfyUI's front-end shows progress text as HTML, and a table's words may be a stranger's."""


def show_text(node_id: str | None, text: str) -> None:
    """Show a line on a node, as text: nothing in it is markup."""
    module = sys.modules.get("server")  # not loaded where ComfyUI is used as a library
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(printable(text).translate(_AS_TEXT), node_id)


def remark(node_id: str | None, remarks: Iterable[str]) -> None:
    """Warn in the log, and show the remarks on the node as one line."""
    text = printable("; ".join(remarks))
    if text:
        logging.warning("D-ODE: %s", text)
        show_text(node_id, text)


def in_words(seconds: float) -> str:
    """A duration: 40 s, 12 min, 3 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
