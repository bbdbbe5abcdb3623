"""What the hidden prompt says of the model: by the graph, whatever is odd in it."""

from __future__ import annotations

import hashlib
from datetime import date

import numpy as np
import pytest
from safetensors.numpy import save

from dode_nodes import LambdaTable, __version__
from tests.tables.rows import row_of

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("pack")]


def graph(**changes):
    """A checkpoint, two LoRAs (one of them off), a patch, and the node."""
    nodes = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sub\\mine v2.safetensors"}},
        "2": {"class_type": "LoraLoader", "inputs": {"model": ["1", 0], "lora_name": "a/style.safetensors",
                                                     "strength_model": 0.8, "strength_clip": 1.0}},
        "3": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["2", 0], "lora_name": "off.safetensors",
                                                              "strength_model": 0}},
        "4": {"class_type": "ModelSamplingDiscrete", "inputs": {"model": ["3", 0], "sampling": "eps"}},
        "7": {"class_type": "DODE_DistillLambdas", "inputs": {"model": ["4", 0], "positive": ["9", 0]}},
        "9": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "of the prompt.safetensors"}},
    }  # fmt: skip
    return nodes | changes


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files that ComfyUI knows: by their last name, whatever the folder."""
    import folder_paths

    found = {}

    def full_path(folder, name):
        return found.get((folder, name))

    def put(folder, name, content):
        path = tmp_path / f"{len(found)}.safetensors"
        path.write_bytes(content)
        found[folder, name] = str(path)

    monkeypatch.setattr(folder_paths, "get_full_path", full_path)
    return put


def test_model_loras_date_and_versions(files):
    from dode_nodes.hosts.comfy.graph_facts import GraphFacts

    lora = save({"w": np.arange(3.0)}, {"title": "my private notes"})
    files("loras", "a/style.safetensors", lora)
    files("checkpoints", "sub\\mine v2.safetensors", b"weights")
    found = GraphFacts.of(graph(), "7")
    assert (found.model, found.loras) == ("mine v2.safetensors", (("a/style.safetensors", 0.8),))
    table = found.on(LambdaTable([row_of()], {"family": "sd15"}))
    (row,) = table.rows
    assert table.model == {
        "family": "sd15", "name": "mine v2.safetensors", "autov2": hashlib.sha256(b"weights").hexdigest()[:10],
    }  # fmt: skip
    weights = hashlib.sha256(np.arange(3.0).tobytes()).hexdigest()
    assert [each.to_json() for each in row.loras] == [
        {"sha256": weights, "strength": 0.8, "name": "style.safetensors"}
    ]
    assert row.settings["package_version"] == __version__
    assert row.settings["host_version"]
    assert row.credit.date == date.today().isoformat()
    assert row.sha256 == row_of().sha256


def test_a_file_is_hashed_once_until_it_changes_and_never_a_huge_one(files, monkeypatch):
    from dode_nodes.hosts.comfy import graph_facts

    def autov2():
        table = graph_facts.GraphFacts.of(graph(), "7").on(LambdaTable([row_of()]))
        return table.model.get("autov2")

    files("checkpoints", "sub\\mine v2.safetensors", b"weights")
    known = autov2()
    opened, opens = [], open
    monkeypatch.setattr(graph_facts, "open", lambda *args: opened.append(args) or opens(*args), raising=False)
    assert autov2() == known
    assert not opened
    files("checkpoints", "sub\\mine v2.safetensors", b"other weights")
    assert autov2() == hashlib.sha256(b"other weights").hexdigest()[:10]
    assert len(opened) == 1
    monkeypatch.setattr(graph_facts, "_LARGEST", 5)
    assert autov2() is None


def test_without_hashes_no_file_is_read(files):
    from dode_nodes.hosts.comfy.graph_facts import GraphFacts

    files("checkpoints", "sub\\mine v2.safetensors", b"weights")
    table = GraphFacts.of(graph(), "7").on(LambdaTable([row_of()]), hashes=False)
    assert table.model == {"name": "mine v2.safetensors"}


@pytest.mark.parametrize(
    "prompt",
    [None, [], {}, {"7": None}, {"7": {}}, {"7": {"inputs": None}}, {"7": {"inputs": {"model": "x"}}},
     {"7": {"inputs": {"model": ["7", 0]}}}, {"7": {"inputs": {"model": []}}}, {"7": {"inputs": {"model": [["x"], 0]}}},
     {"7": {"inputs": {"ckpt_name": ["1", 0], "lora_name": "x", "strength_model": "1"}}}],
)  # fmt: skip
def test_odd_graphs_say_nothing(prompt):
    from dode_nodes.hosts.comfy.graph_facts import GraphFacts

    assert GraphFacts.of(prompt, "7") == GraphFacts()


def test_names_are_names_of_files_without_folders_and_steer_nothing():
    from dode_nodes.hosts.comfy.graph_facts import GraphFacts

    loader = {"inputs": {"unet_name": "C:\\Users\\my name\\secret\\fl\x1bux\u202e.gguf"}}
    (found,) = [
        GraphFacts.of(
            {"7": {"inputs": {"guider": ["8", 0]}}, "8": {"inputs": {"model": ["1", 0]}}, "1": loader}, "7"
        )
    ]
    assert found.model == "fl\N{REPLACEMENT CHARACTER}ux\N{REPLACEMENT CHARACTER}.gguf"
    assert found.on(LambdaTable([row_of()])).model["name"] == found.model
