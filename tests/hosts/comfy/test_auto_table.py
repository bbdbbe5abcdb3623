"""A node without a table takes one of the user's for its model, says which, and notes it in the workflow."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dode_nodes import DodeError, LambdaTable
from dode_nodes.tables.auto import pin_of
from tests.hosts.comfy.node_calls import CFG, empty, ksampler, zero_table
from tests.hosts.conftest import conditioning

pytestmark = pytest.mark.comfyui


@pytest.fixture
def tables(pack, tmp_path, monkeypatch):
    """An empty lambdas folder, and nobody trusted yet."""
    import folder_paths

    from dode_nodes.hosts.comfy import auto_table

    folder = tmp_path / "lambdas"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "lambdas", ([str(folder)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    folder_paths.filename_list_cache.pop("lambdas", None)
    for each in (auto_table._shelf, auto_table.trust):
        each.cache_clear()
    yield folder
    for each in (auto_table._shelf, auto_table.trust):
        each.cache_clear()


def put(folder: Path, name: str, table: LambdaTable, *, own: bool = True) -> LambdaTable:
    from dode_nodes.hosts.comfy import auto_table

    table = replace(table, name=name)
    table.save(folder / f"{name}.safetensors")
    if own:
        auto_table.keep(table)
    return table


def of_seed(seed: int, make_model: Any) -> Any:
    """A model with weights of its own."""
    torch.manual_seed(seed)
    return make_model()


def sample(dode: Any, model: Any, **changes: Any) -> torch.Tensor:
    settings = {"steps": 8, "cfg": CFG, "seed": 5, "denoise": 1.0, "solver": "any"} | changes
    (result,) = dode.run(
        dode.pack.DodeKSampler, model=model, latent_image=empty(), positive=dode.inputs.positive,
        negative=dode.inputs.negative, **settings,
    )  # fmt: skip
    return result["samples"]


def test_a_ksampler_takes_the_table_of_its_model_and_says_so(make_model, dode, tables, on_the_node):
    model, other = (of_seed(seed, make_model) for seed in (1, 2))
    table = put(tables, "z-mine", dode.table(model))
    put(tables, "a-other", dode.table(other, seed=3))
    assert torch.equal(sample(dode, model), dode.ksampler(model, table, empty()))
    assert f"λ table z-mine {table.sha256[:8]}: made for this checkpoint" in on_the_node


def with_lora(model: Any, seed: int, strength: float = 1.0) -> Any:
    """The model with a LoRA on its first matrix, loaded as from a file."""
    import comfy.sd

    name, weight = next(
        (name, weight)
        for name, weight in model.model_state_dict(filter_prefix="diffusion_model.").items()
        if weight.ndim > 1
    )
    generator = torch.Generator().manual_seed(seed)
    stem = name.removesuffix(".weight")
    file = {
        f"{stem}.lora_up.weight": torch.randn(len(weight), 2, generator=generator) / 10,
        f"{stem}.lora_down.weight": torch.randn(2, weight[0].numel(), generator=generator) / 10,
    }
    return comfy.sd.load_lora_for_models(model, None, file, strength, 0.0)[0]


def test_a_table_made_with_the_lora_that_is_on_goes_before_one_made_with_another(make_model, dode, tables):
    """Two LoRAs on as many weights and of one strength differ by nothing but what is in them."""
    from dode_nodes.hosts.comfy import auto_table
    from dode_nodes.hosts.comfy.model_facts import model_facts

    model = of_seed(1, make_model)
    made = {}
    for file, loras in {"a": (7,), "b": (8,), "c": (7, 8)}.items():
        patched = model
        for seed in loras:
            patched = with_lora(patched, seed)
        row = zero_table(model, "euler").rows[0]
        weights = np.full(8, len(made) / 100)
        made[file] = put(tables, file, LambdaTable([replace(row, weights=weights)], model_facts(patched)))

    def chosen(model: Any) -> str:
        return auto_table.choose(model, preset="", family_match=True).table.name

    assert chosen(with_lora(model, 7)) == "a"
    assert chosen(with_lora(model, 8)) == "b"
    assert chosen(with_lora(model, 8, strength=0.5)) == "b"
    assert chosen(with_lora(with_lora(model, 8), 7)) == "c"  # in whichever order


@pytest.mark.slow_host
def test_a_match_of_the_family_is_said_and_can_be_switched_off(make_model, dode, tables, on_the_node):
    put(tables, "other", dode.table(of_seed(1, make_model)))
    sample(dode, of_seed(2, make_model))
    assert any("only a family match" in line for line in on_the_node)
    with pytest.raises(DodeError, match="there is none for this checkpoint in your lambdas folders"):
        sample(dode, of_seed(2, make_model), family_match=False)


def test_no_table_says_what_to_do_before_the_network_is_asked(make_model, dode, tables):
    model = make_model()
    with pytest.raises(DodeError, match="connect a λ table, or make one with Distill λ"):
        sample(dode, model)
    put(tables, "mine", zero_table(model, "euler"))
    with pytest.raises(DodeError, match="distil a table with 7 steps, or choose steps that there are: mine"):
        sample(dode, model, steps=7)
    assert model.model.evaluated == 0


@pytest.mark.slow_host
def test_a_strangers_table_is_taken_after_it_was_loaded_by_name(make_model, dode, tables):
    model = make_model()
    put(tables, "stranger", zero_table(model, "euler"), own=False)
    with pytest.raises(DodeError, match="pick the λ table stranger once in Load λ table"):
        sample(dode, model)
    dode.run(dode.pack.LoadLambdas, name="stranger.safetensors")
    sample(dode, model)


def test_what_is_distilled_or_saved_is_ones_own(make_model, dode, tables, lambdas_folder, monkeypatch):
    from dode_nodes.hosts.comfy import table_files

    monkeypatch.setattr(table_files, "save_folder", lambda: tables)
    model = make_model()
    dode.distil(model)
    sample(dode, model)
    other = make_model("FLOW")
    dode.run(
        dode.pack.SaveLambdas, table=zero_table(other, "euler", scheduler="simple"), save_name="flow", rows="",
        author="", licence="", notes="", model_name="",
    )  # fmt: skip
    sample(dode, other)


def test_apply_and_load_choose_as_well(make_model, dode, tables):
    model = make_model()
    table = put(tables, "mine", dode.table(model))
    (patched,) = dode.run(dode.pack.ApplyLambdas, model=model, solver="any")
    assert torch.equal(ksampler(patched, empty()), ksampler(dode.apply(model, table), empty()))
    assert dode.run(dode.pack.LoadLambdas, name="auto", model=model)[0] == table
    with pytest.raises(DodeError, match="connect the model to choose a table for"):
        dode.run(dode.pack.LoadLambdas, name="auto")
    with pytest.raises(DodeError, match="connect a λ table, or make one"):
        dode.run(dode.pack.LoadLambdas, name="auto", model=make_model("FLOW"))


def test_a_table_loaded_by_name_is_looked_at_for_a_model(make_model, dode, tables, on_the_node):
    put(tables, "mine", dode.table(of_seed(1, make_model)))
    dode.run(dode.pack.LoadLambdas, name="mine.safetensors", model=of_seed(2, make_model))
    assert "another checkpoint of this family" in on_the_node[-1]


# --- Notes in the workflow ----------------------------------------------------------------------------


def graph(pack: SimpleNamespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """A KSampler (D-ODE) with the id that tests give nodes, as prompt and as workflow."""
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x"}},
        "7": {"class_type": "DODE_KSampler", "inputs": {"model": ["1", 0], "seed": 5, "steps": 8}},
    }
    node = {
        "id": 7,
        "type": "DODE_KSampler",
        "widgets_values": [5, "fixed", 8, CFG, 1.0, "any", True, "", False],
    }
    return prompt, {"workflow": {"nodes": [{"id": 1, "type": "CheckpointLoaderSimple"}, node]}}


def run_in_graph(dode: Any, node: Any, prompt: Any, info: Any, **inputs: Any) -> Any:
    hidden = {"UNIQUE_ID": "7", "PROMPT": prompt, "EXTRA_PNGINFO": info}
    hidden = {"hidden_inputs": hidden} | hidden
    return node.PREPARE_CLASS_CLONE(hidden).EXECUTE_NORMALIZED(**inputs).args


@pytest.fixture
def sampled(make_model, dode, tables):
    """A run of a KSampler (D-ODE) in a graph, and what it left in the workflow."""
    from dode_nodes.hosts.comfy import pins

    pins._notes.clear()
    model = make_model()
    table = put(tables, "mine", zero_table(model, "euler"))

    def run(prompt: Any, info: Any, **changes: Any) -> torch.Tensor:
        settings = {"steps": 8, "cfg": CFG, "seed": 5, "denoise": 1.0, "solver": "any"} | changes
        return run_in_graph(
            dode, dode.pack.DodeKSampler, prompt, info, model=model, latent_image=empty(), positive=conditioning(0.2),
            negative=conditioning(-0.1), **settings,
        )[0]["samples"]  # fmt: skip

    return SimpleNamespace(run=run, table=table, model=model)


def test_a_run_pins_the_workflow_that_is_saved_with_the_picture(dode, tables, sampled):
    prompt, info = graph(dode.pack)
    first = sampled.run(prompt, info)
    node = info["workflow"]["nodes"][1]
    pin = pin_of(sampled.table)
    assert node["widgets_values"] == [5, "fixed", 8, CFG, 1.0, "any", True, pin, False]
    assert node["properties"] == {"dode_table": pin}

    better = replace(sampled.table, rows=[replace(sampled.table.rows[0], weights=[0.0, *[0.1] * 7])])
    put(tables, "a-new", better)
    assert not torch.equal(sampled.run(*graph(dode.pack)), first)
    assert torch.equal(sampled.run(prompt, info, preset=pin), first)


def test_a_cached_run_pins_it_as_well(dode, sampled):
    from dode_nodes.hosts.comfy.pins import on_prompt

    prompt, info = graph(dode.pack)
    sampled.run(prompt, info)
    again, fresh = graph(dode.pack)
    again["9"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": "another"}}
    queued = {"prompt": again, "extra_data": {"extra_pnginfo": fresh}}
    assert on_prompt(queued) is queued
    assert fresh["workflow"]["nodes"][1]["widgets_values"][-2] == pin_of(sampled.table)

    changed, fresh = graph(dode.pack)
    changed["1"]["inputs"]["ckpt_name"] = "another model"
    on_prompt({"prompt": changed, "extra_data": {"extra_pnginfo": fresh}})
    assert fresh == graph(dode.pack)[1]


def test_a_node_in_a_subgraph_is_found(sampled, dode):
    from dode_nodes.hosts.comfy import pins

    inner = {"id": 7, "type": "DODE_KSampler", "widgets_values": [0] * 9}
    workflow = {
        "nodes": [{"id": 12, "type": "a-b-c"}],
        "definitions": {"subgraphs": [{"id": "other", "nodes": []}, {"id": "a-b-c", "nodes": [inner]}]},
    }
    assert pins._node(workflow, "12:7") is inner
    assert pins._node(workflow, "13:7") is None
    assert pins._node(workflow, "7") is None


@pytest.mark.parametrize(
    "queued",
    [{}, {"prompt": None}, {"prompt": []}, {"prompt": {}, "extra_data": None}, {"prompt": {"7": None}, "extra_data": {}},
     {"prompt": {"7": {"class_type": "DODE_KSampler", "inputs": {"model": ["7", 0]}}},
      "extra_data": {"extra_pnginfo": {"workflow": []}}},
     {"prompt": {"7": {"class_type": "DODE_KSampler"}}, "extra_data": {"extra_pnginfo": {"workflow": {"nodes": 3}}}}],
)  # fmt: skip
def test_odd_prompts_pass_as_they_are(queued, pack):
    from dode_nodes.hosts.comfy.pins import on_prompt

    before = copy.deepcopy(queued)
    assert on_prompt(queued) == before


def test_widgets_of_another_number_are_left_alone(dode, sampled):
    prompt, info = graph(dode.pack)
    info["workflow"]["nodes"][1]["widgets_values"] = [5, "fixed"]
    sampled.run(prompt, info)
    assert info["workflow"]["nodes"][1]["widgets_values"] == [5, "fixed"]


# --- ComfyUI's cache ----------------------------------------------------------------------------------


def test_new_and_changed_files_make_a_node_choose_again(make_model, dode, tables):
    model = make_model()
    for node in (dode.pack.DodeKSampler, dode.pack.ApplyLambdas):
        look = node.fingerprint_inputs
        before = look(preset="")
        assert look(preset="") == before
        assert look(preset="", table=None) == look(preset="mine 0123") == ""  # connected, or pinned
        table = put(tables, f"mine-{node.__name__}", zero_table(model, "euler"), own=False)
        assert look(preset="") != before
        before = look(preset="")
        dode.run(dode.pack.LoadLambdas, name=f"{table.name}.safetensors")
        if node is dode.pack.DodeKSampler:  # the second has the same numbers: it is trusted already
            assert look(preset="") != before
    look = dode.pack.LoadLambdas.fingerprint_inputs
    before = look(name="auto")
    (tables / "mine-ApplyLambdas.safetensors").unlink()
    assert look(name="auto") != before
