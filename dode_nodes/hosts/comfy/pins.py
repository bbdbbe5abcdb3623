"""What a run has chosen or saved, noted in the workflow that is saved with its pictures.

A node that ComfyUI does not run again, because nothing has changed, writes nothing. What it wrote for the same graph is
remembered, and written again when the graph is queued.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

from comfy_api.latest import io

from ...tables.auto import pin_of
from ...tables.table import LambdaTable

PROPERTY = "dode_table"
"""Of a node in a workflow: name and digits of its table."""
_MOST = 512
_OURS = "DODE_"


class _Note(NamedTuple):
    """What to write: into the node's properties, and where ``place`` is not None into that widget of so many."""

    pin: str
    place: int | None
    widgets: int


_notes: OrderedDict[str, _Note] = OrderedDict()


def note(node: type[io.ComfyNode], table: LambdaTable, *, widget: str | None = None) -> None:
    """Note which table a node that runs has chosen or saved.

    Args:
        node: as ComfyUI has prepared it, with the hidden inputs.
        widget: that pins the node to the table, once the workflow is opened again.
    """
    hidden = node.hidden
    widgets = _widgets(node) if widget else []
    written = _Note(pin_of(table), widgets.index(widget) if widget else None, len(widgets))
    key = _signature(hidden.prompt, hidden.unique_id)
    if key is not None:
        _notes[key] = written
        _notes.move_to_end(key)
        while len(_notes) > _MOST:
            _notes.popitem(last=False)
    _write(hidden.extra_pnginfo, hidden.unique_id, written)


def on_prompt(queued: dict[str, Any]) -> dict[str, Any]:
    """Called with what is queued, before it runs."""
    try:
        prompt = queued.get("prompt")
        info = queued.get("extra_data", {}).get("extra_pnginfo")
        for node_id, node in prompt.items() if isinstance(prompt, Mapping) and info else ():
            if isinstance(node, Mapping) and str(node.get("class_type", "")).startswith(_OURS):
                key = _signature(prompt, node_id)
                if key is not None and (written := _notes.get(key)) is not None:
                    _write(info, node_id, written)
    except (AttributeError, TypeError) as error:  # an odd graph: ComfyUI says what is wrong with it
        logging.debug("D-ODE: %s", error)
    return queued


def _widgets(node: type[io.ComfyNode]) -> list[str]:
    """In the order of a saved workflow's values: required ones first, and a control after each seed."""
    inputs = [each for each in node.define_schema().inputs if isinstance(each, io.WidgetInput)]
    names = []
    for each in sorted(inputs, key=lambda each: bool(each.optional)):
        names.append(each.id)
        if getattr(each, "control_after_generate", None):
            names.append(f"{each.id} control")
    return names


def _signature(prompt: Any, node_id: Any) -> str | None:
    """Of a node and all that it depends on: the same for the same work. None where the graph is odd."""
    known: dict[str, str] = {}

    def of(each: str) -> str:
        if each not in known:
            known[each] = ""  # a circle, which ComfyUI refuses
            inputs = prompt[each].get("inputs", {})
            parts = {
                name: [of(str(value[0])), value[1]] if _is_link(value) and str(value[0]) in prompt else value
                for name, value in inputs.items()
            }
            text = json.dumps([prompt[each].get("class_type"), parts], sort_keys=True, default=str)
            known[each] = hashlib.sha256(text.encode()).hexdigest()
        return known[each]

    try:
        return of(str(node_id))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return None


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)


def _write(info: Any, node_id: Any, written: _Note) -> None:
    node = _node(info.get("workflow") if isinstance(info, Mapping) else None, str(node_id))
    if node is None:
        return
    properties = node.setdefault("properties", {})
    if isinstance(properties, dict):
        properties[PROPERTY] = written.pin
    values = node.get("widgets_values")
    if written.place is not None and isinstance(values, list) and len(values) == written.widgets:
        values[written.place] = written.pin


def _node(workflow: Any, node_id: str) -> dict[str, Any] | None:
    """A node of a workflow; in a subgraph its id is 12:3."""
    *above, last = node_id.split(":")
    place = workflow
    for each in above:
        outer = _by_id(place, each)
        definitions = (
            workflow.get("definitions", {}).get("subgraphs", []) if isinstance(workflow, Mapping) else []
        )
        place = next(
            (one for one in definitions if outer is not None and one.get("id") == outer.get("type")), None
        )
    return _by_id(place, last)


def _by_id(place: Any, node_id: str) -> dict[str, Any] | None:
    nodes = place.get("nodes", []) if isinstance(place, Mapping) else []
    return next((node for node in nodes if isinstance(node, dict) and str(node.get("id")) == node_id), None)
