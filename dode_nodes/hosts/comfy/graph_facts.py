"""What a graph says of the model that reaches a node: which file it was loaded from, and with which LoRAs."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any

import comfyui_version
import folder_paths

from ... import __version__
from ...tables.describe import printable
from ...tables.provenance import Credit, Lora
from ...tables.table import LambdaTable

_LOADERS = {
    "ckpt_name": "checkpoints", "unet_name": "diffusion_models", "gguf_name": "diffusion_models", "model_path": "",
}  # fmt: skip
"""Inputs that name a model's file, and ComfyUI's folder for it."""
_LORA, _STRENGTH = "lora_name", ("strength_model", "strength")
_WAYS = ("model", "guider", "model1", "model_1")
"""Inputs that a model comes through."""
_LARGEST = 32 * 2**30
"""Bytes; as much as models of 14 billion numbers in fp16 have. Reading more for a hash would take minutes."""
_SAID = 2**32
"""Bytes; with more of them the log says what is waited for."""
_LONGEST = 200


@dataclass(frozen=True)
class GraphFacts:
    """What was found.

    Attributes:
        model: the model's file without its folder; "" where there is none.
        path: that file, if ComfyUI knows it.
        loras: names of files, and strengths.
    """

    model: str = ""
    path: Path | None = None
    loras: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, prompt: Any, node_id: str | None) -> GraphFacts:
        """Of the graph that runs, as ComfyUI hands it to a node; whatever is odd in it is passed over."""
        model, path, loras = "", None, []
        for inputs in _upstream(prompt, node_id):
            for name, folder in _LOADERS.items():
                if not model and isinstance(inputs.get(name), str):
                    model, path = _base_name(inputs[name]), _file(folder, inputs[name])
            strength = next((inputs[each] for each in _STRENGTH if each in inputs), None)
            if isinstance(inputs.get(_LORA), str) and isinstance(strength, (int, float)) and strength:
                loras.append((inputs[_LORA], float(strength)))
        return cls(model, path, tuple(loras))

    def on(self, table: LambdaTable, *, hashes: bool = True) -> LambdaTable:
        """The table with the model's name, LoRAs, date and versions.

        Args:
            hashes: whether files may be read for them.
        """
        loras = [lora for name, strength in self.loras if hashes and (lora := _lora(name, strength))]
        facts = {
            "package_version": __version__,
            "host_version": printable(str(comfyui_version.__version__))[:50],
        }
        rows = [
            replace(
                row,
                loras=tuple(loras),
                settings=dict(row.settings) | facts,
                credit=row.credit or Credit(date=date.today().isoformat()),
            )
            for row in table.rows
        ]
        model = dict(table.model)
        if self.model:
            model["name"] = self.model
        if hashes and self.path is not None and (autov2 := _sha256(self.path, weights_only=False)):
            model["autov2"] = autov2[:10]
        return replace(table, rows=rows, model=model)


def _upstream(prompt: Any, node_id: str | None) -> Iterator[Mapping[str, Any]]:
    """The inputs of a node, then of those that its model comes from, nearest first."""
    seen: set[str] = set()
    waiting = [node_id]
    while waiting:
        node = waiting.pop(0)
        if node in seen or not isinstance(prompt, Mapping) or not isinstance(prompt.get(node), Mapping):
            continue
        seen.add(str(node))
        inputs = prompt[node].get("inputs")
        if not isinstance(inputs, Mapping):
            continue
        yield inputs
        links = (inputs.get(name) for name in _WAYS)
        waiting += [str(link[0]) for link in links if isinstance(link, list) and link]


def _base_name(name: str) -> str:
    return printable(PureWindowsPath(name).name).replace("\n", " ")[
        :_LONGEST
    ]  # either slash separates folders


def _file(folder: str, name: str) -> Path | None:
    try:
        found = folder_paths.get_full_path(folder, name) if folder else None
    except Exception:  # a folder that this ComfyUI does not have
        return None
    return Path(found) if found else None


def _lora(name: str, strength: float) -> Lora | None:
    path = _file("loras", name)
    sha256 = None if path is None else _sha256(path, weights_only=path.suffix == ".safetensors")
    return None if sha256 is None else Lora(sha256, strength, _base_name(name))


def _sha256(path: Path, *, weights_only: bool) -> str | None:
    """Of a file, or of a safetensors file's weights, whatever is written about them; None where it cannot be read."""
    try:
        status = os.stat(path)
        if status.st_size > _LARGEST:
            return None
        return _sha256_once(path, status.st_mtime_ns, status.st_size, weights_only)
    except (OSError, OverflowError) as error:
        logging.warning("D-ODE: no hash of %s: %s", path.name, error)
        return None


@lru_cache(maxsize=256)
def _sha256_once(path: Path, modified: int, size: int, weights_only: bool) -> str:
    """A file that has not changed since is not read again."""
    if size > _SAID:
        logging.info("D-ODE: reading %s once, to note its hash in the λ table", path.name)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if weights_only:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
