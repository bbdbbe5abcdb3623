"""The example workflows, as files and in the form that ComfyUI's /prompt takes."""

from __future__ import annotations

import json
from typing import Any

from tests.import_comfyui import REPOSITORY

Json = dict[str, Any]

EXAMPLES = sorted((REPOSITORY / "example_workflows").glob("*.json"))
NAMES = [path.stem for path in EXAMPLES]


def read_example(name: str) -> Json:
    """An example as the front end saved it."""
    return json.loads((REPOSITORY / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))


def to_prompt(workflow: Json, object_info: Json) -> Json:
    """A saved workflow in API format, as the front end's ``graphToPrompt`` makes it.

    Knows what the examples have: no subgraphs, no muted or bypassed nodes, no reroutes.
    """
    sources = {link: [str(node), slot] for link, node, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in object_info:  # notes, of the front end alone
            continue
        inputs = _widgets(object_info[node["type"]]["input"], node.get("widgets_values", []))
        inputs |= {
            each["name"]: sources[each["link"]] for each in node["inputs"] if each.get("link") is not None
        }
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _widgets(declared: Json, values: list[Any]) -> Json:
    remaining = iter(values)
    inputs = {}
    for name, (kind, *options) in (declared.get("required", {}) | declared.get("optional", {})).items():
        if not isinstance(kind, list) and kind not in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"):
            continue
        inputs[name] = next(remaining)
        controlled = (options or [{}])[0].get("control_after_generate")
        if controlled or (controlled is None and name in ("seed", "noise_seed")):
            next(remaining)  # fixed, increment, …
    assert next(remaining, None) is None, f"{declared} does not take {values}"
    return inputs


CHEAP = {
    "EmptyLatentImage": {"width": 32, "height": 32},
    "DODE_DistillLambdas": {"quality": "quick", "steps": "2"},
    "DODE_DistillOptions": {"latents": 4, "scale": 2, "prediction": "noise"},
    "DODE_Compare": {"pictures": 1, "scale": 2},
}
"""Changes to a graph with a checkpoint, which is not made for a CPU: widgets of node types."""

QUICK = {
    "DODE_DistillLambdas": {"quality": "quick", "steps": "2"},
    "DODE_Compare": {"pictures": 2, "scale": 4},
}
"""Changes to a graph with the demo model of pictures, to try it in seconds instead of minutes."""


def changes_for(name: str) -> Json:
    """What to change in an example to try it here."""
    types = {node["type"] for node in read_example(name)["nodes"]}
    if "CheckpointLoaderSimple" in types:
        return CHEAP
    return QUICK if "DODE_DemoPictures" in types else {}


def change(prompt: Json, changes: Json) -> Json:
    """The graph with other values in some nodes' widgets."""
    return {
        number: node | {"inputs": node["inputs"] | changes.get(node["class_type"], {})}
        for number, node in prompt.items()
    }
