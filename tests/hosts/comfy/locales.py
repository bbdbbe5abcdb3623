"""The nodes' own texts in the form of locales/en/nodeDefs.json, which must say the same.

python -m tests.hosts.comfy.locales    # writes that file anew, after a text of a node has changed
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from dode_nodes.hosts.comfy.launch import find_comfyui
from tests.import_comfyui import REPOSITORY, import_comfyui

LOCALES = REPOSITORY / "locales"


def read(language: str, name: str) -> dict[str, Any]:
    """A file of locales/."""
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def english(nodes: list[Any]) -> dict[str, Any]:
    """What locales/en/nodeDefs.json must hold."""
    return {schema.node_id: _texts(schema) for schema in (node.GET_SCHEMA() for node in nodes)}


def _texts(schema: Any) -> dict[str, Any]:
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {
            each.id: {"name": each.display_name or each.id, "tooltip": each.tooltip} for each in schema.inputs
        },
        "outputs": {
            str(i): {"name": each.display_name or each.id, "tooltip": each.tooltip}
            for i, each in enumerate(schema.outputs)
        },
    }


def main() -> None:
    """Write locales/en/nodeDefs.json."""
    import_comfyui(find_comfyui(), Path(tempfile.mkdtemp()))
    from dode_nodes.hosts.comfy.extension import DodeExtension

    texts = english(asyncio.run(DodeExtension().get_node_list()))
    path = LOCALES / "en" / "nodeDefs.json"
    path.write_text(json.dumps(texts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
