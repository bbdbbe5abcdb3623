"""The pack in a real server, over HTTP: it loads, its examples run, its tables are found, it can be stopped."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from dode_nodes import LambdaRow, LambdaTable, sample_dode
from dode_nodes.demo.models import load_demo_model
from tests.hosts.comfy.node_calls import saved_as
from tests.import_comfyui import REPOSITORY
from tests.server import PACK, ComfyServer, errors_of
from tests.workflows import NAMES, change, changes_for, read_example, to_prompt

pytestmark = pytest.mark.comfyui

NODES = {
    "DODE_DistillLambdas", "DODE_DistillOptions", "DODE_LoadLambdas", "DODE_ImportLambdas", "DODE_SaveLambdas",
    "DODE_InspectLambdas", "DODE_FindStock", "DODE_DistillLoRA",
    "DODE_Sampler", "DODE_Sigmas", "DODE_KSampler", "DODE_ApplyLambdas", "DODE_Compare", "DODE_DemoModel",
    "DODE_DemoPictures",
}  # fmt: skip


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> dict[str, Any]:
    return server.get("/object_info")


def distil_prompt(**changes: Any) -> dict[str, Any]:
    """Distil λ on the demo model: a second's work."""
    inputs = {
        "model": ["demo", 0], "positive": ["demo", 1], "negative": ["demo", 2], "latent": ["empty", 0],
        "cfg": 2.0, "seed": 0, "steps": "4", "quality": "quick", "save_name": "table", "options": ["options", 0],
    }  # fmt: skip
    options = {
        "cfgs": "", "latents": 4, "refine_budget": 0.0, "solver": "euler", "scheduler": "karras", "scale": 3,
        "teacher": "dpmpp_2m", "prediction": "noise", "micro_batch": 0,
    }  # fmt: skip
    further = {
        name: value for name, value in changes.items() if name in {*options, "positive_2", "positive_3"}
    }
    changes = {name: value for name, value in changes.items() if name not in further}
    return demo_nodes("eps") | {
        "options": {"class_type": "DODE_DistillOptions", "inputs": options | further},
        "distil": {"class_type": "DODE_DistillLambdas", "inputs": inputs | changes},
    }


def sample_prompt(table: str, kind: str = "eps", batch: int = 2, **changes: Any) -> dict[str, Any]:
    """Sample the demo model with a saved table, and save the latent."""
    inputs = {
        "model": ["demo", 0], "positive": ["demo", 1], "negative": ["demo", 2], "latent_image": ["empty", 0],
        "table": ["table", 0], "seed": 5, "steps": 4, "cfg": 2.0, "denoise": 1.0, "solver": "any",
    }  # fmt: skip
    return demo_nodes(kind, batch) | {
        "table": {"class_type": "DODE_LoadLambdas", "inputs": {"name": table}},
        "sample": {"class_type": "DODE_KSampler", "inputs": inputs | changes},
        "save": {
            "class_type": "SaveLatent",
            "inputs": {"samples": ["sample", 0], "filename_prefix": "sampled"},
        },
    }


def demo_nodes(kind: str, batch: int = 1) -> dict[str, Any]:
    return {
        "demo": {"class_type": "DODE_DemoModel", "inputs": {"kind": kind, "digit": 3}},
        "empty": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": batch},
        },
    }


def succeeded(result: dict[str, Any]) -> dict[str, Any]:
    """The outputs of a graph that ran."""
    assert result["status"]["status_str"] == "success", errors_of(result)
    return result["outputs"]


def tables_in(server: ComfyServer) -> set[str]:
    """Every file in the pack's lambdas folder, but for what a fit that was ended goes on from."""
    folder = server.pack / "lambdas"
    files = {path for path in folder.rglob("*") if path.is_file()}
    return {str(path.relative_to(folder)) for path in files if path.suffix != ".dode-work"}


def pictures_of(server: ComfyServer, outputs: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    """The pictures that each node shows."""
    return {
        node: [np.asarray(Image.open(io.BytesIO(server.picture(each)))) for each in output["images"]]
        for node, output in outputs.items()
        if "images" in output
    }


def test_loads_without_a_warning(server):
    about_us = [line for line in server.log.splitlines() if re.search(rf"{PACK}|dode|d-ode", line, re.I)]
    level = r"(?:\x1b\[32m\[INFO\]\x1b\[0m)?"  # newer ones begin a line with it
    imported = rf"{level}\s+[\d.]+ seconds: {re.escape(str(server.pack))}"
    assert len(about_us) >= 1
    assert re.fullmatch(imported, about_us[0]), about_us[0]


def test_every_node_input_and_output_has_a_text(object_info):
    ours = {name: node for name, node in object_info.items() if name.startswith("DODE_")}
    assert set(ours) == NODES
    for name, node in ours.items():
        assert node["category"] == "sampling/D-ODE", name
        assert node["description"], name
        inputs = node["input"].get("required", {}) | node["input"].get("optional", {})
        assert all(options.get("tooltip") for _, options in inputs.values()), name
        assert all(node["output_tooltips"]), name


@pytest.mark.slow_host
@pytest.mark.parametrize("name", NAMES)
def test_example_runs_and_shows_pictures(name, server, object_info):
    prompt = change(to_prompt(read_example(name), object_info), changes_for(name))
    outputs = succeeded(server.run(prompt))
    pictures = pictures_of(server, outputs)
    showing = {number for number, node in prompt.items() if object_info[node["class_type"]]["output_node"]}
    assert set(pictures) == showing
    for images in pictures.values():
        assert all(image.std() > 5 for image in images)
    if name == "3_sample_with_a_table":
        (images,) = pictures.values()
        ksampler, by_patch, sampler = np.array_split(np.stack(images).astype(int), 3)
        assert np.abs(ksampler - sampler).max() <= 1
        assert np.abs(ksampler - by_patch).max() > 1  # λ alone


def test_examples_are_those_of_the_readme_with_thumbnails():
    assert [name[0] for name in NAMES] == ["1", "2", "3", "4", "5", "6"]
    for name in NAMES:
        thumbnail = REPOSITORY / "example_workflows" / f"{name}.jpg"
        assert thumbnail.stat().st_size < 200_000
        assert min(Image.open(thumbnail).size) > 400


@pytest.mark.parametrize("name", NAMES)
def test_an_example_opens_with_all_of_it_in_view(name):
    """On a page of 1600 × 1000."""
    workflow = read_example(name)
    view = workflow["extra"]["ds"]
    boxes = [[*node["pos"], *node["size"]] for node in workflow["nodes"]]
    boxes += [group["bounding"] for group in workflow["groups"]]
    for left, top, width, height in boxes:
        for place, length, axis, most in ((left, width, 0, 1600), (top, height, 1, 1000)):
            first, last = (view["scale"] * (x + view["offset"][axis]) for x in (place, place + length))
            assert 0 <= first < last <= most


def test_latents_equal_the_librarys_own(server):
    """The flow model, whose timestep is no table's entry: no rounding between the two but float32's."""
    outputs = succeeded(server.run(sample_prompt("demo_flow.safetensors", "flow", batch=3, steps=8)))
    (saved,) = outputs["save"]["latents"]
    file = server.base / "output" / saved["subfolder"] / saved["filename"]
    latents = safetensors.torch.load_file(file)["latent_tensor"]

    model = load_demo_model("flow")
    table = LambdaTable.load(server.pack / "lambdas" / "demo_flow.safetensors")
    row = min((row for row in table.rows if row.steps == 8), key=LambdaRow.error_from)
    noise = torch.randn((3, *model.latent_shape), generator=torch.manual_seed(5))
    labels = torch.full((3,), 3)
    expected = sample_dode(
        model.denoiser(2.0), noise, row.sigmas, {"labels": labels}, row=row, disable=True, solver="euler"
    )
    torch.testing.assert_close(latents, expected.float(), rtol=1e-3, atol=1e-3)


def test_a_distilled_table_is_saved_offered_and_sampled_with(server):
    before = tables_in(server)
    succeeded(server.run(distil_prompt(save_name="mine/four")))
    (name,) = tables_in(server) - before
    assert server.pack / "lambdas" / name == saved_as("four", server.pack / "lambdas" / "mine")
    table = LambdaTable.load(server.pack / "lambdas" / name)
    assert [row.label for row in table.rows] == ["euler, 4 steps (4 evaluations, noise)"]
    offered = server.get("/object_info/DODE_LoadLambdas")["DODE_LoadLambdas"]["input"]["required"]["name"]
    assert name in offered[1]["options"]
    succeeded(server.run(sample_prompt(name)))


def test_a_guider_is_distilled_and_its_table_sampled_with(server):
    guider = {"class_type": "BasicGuider", "inputs": {"model": ["demo", 0], "conditioning": ["demo", 1]}}
    prompt = distil_prompt(save_name="guided") | {"guider": guider}
    inputs = prompt["distil"]["inputs"]
    for name in ("model", "positive", "negative"):
        del inputs[name]
    inputs["guider"] = ["guider", 0]
    succeeded(server.run(prompt))
    path = saved_as("guided", server.pack / "lambdas")
    (row,) = LambdaTable.load(path).rows
    assert row.settings["cfg"] == 1.0
    succeeded(server.run(sample_prompt(path.name, cfg=1.0)))


@pytest.mark.slow_host  # a server runs it as the fit of one row above
def test_a_refined_table_is_saved_and_sampled_with(server):
    logged = len(server.log)
    succeeded(server.run(distil_prompt(save_name="refined", refine_budget=8.0)))
    cost = re.search(r"D-ODE: at most \d+ evaluations: .* refining", server.log[logged:])
    assert cost is not None
    assert "D-ODE teacher" not in server.log[logged:][: cost.start()]
    path = saved_as("refined", server.pack / "lambdas")
    table = LambdaTable.load(path)
    assert [row.is_refined for row in table.rows] == [False, True]
    succeeded(server.run(sample_prompt(path.name)))


@pytest.mark.slow_host  # a server's cancel is tested below
def test_cancel_in_the_refinement_keeps_what_was_found(server):
    before, logged = tables_in(server), len(server.log)
    cancelled = server.queue(distil_prompt(latents=32, steps="8", save_name="stopped", refine_budget=100.0))
    server.wait(lambda: "D-ODE refining" in server.log[logged:], 60)
    server.post("/interrupt", {})
    result = server.result(cancelled, 20)
    assert "execution_interrupted" in [kind for kind, _ in result["status"]["messages"]]
    path = saved_as("stopped-partial", server.pack / "lambdas")
    assert tables_in(server) - before == {path.name}
    succeeded(server.run(sample_prompt(path.name, steps=8)))


def test_distils_again_only_when_an_input_changed(server):
    def cached(prompt: dict[str, Any]) -> list[str]:
        messages = server.run(prompt)["status"]["messages"]
        return next(message["nodes"] for kind, message in messages if kind == "execution_cached")

    cached(distil_prompt(save_name="again"))
    before = tables_in(server)
    assert "distil" in cached(distil_prompt(save_name="again"))
    assert tables_in(server) == before
    assert "distil" not in cached(distil_prompt(save_name="again", seed=1))
    (name,) = tables_in(server) - before
    assert re.fullmatch(r"again-[0-9a-f]{8}\.safetensors", name)


def auto_prompt(prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sample the demo model without a table and save a picture; with the workflow as a front end would send it."""
    prompt = sample_prompt("none")
    for name in ("table", "save"):
        del prompt[name]
    del prompt["sample"]["inputs"]["table"]
    prompt["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["demo", 3]}}
    prompt["picture"] = {
        "class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": prefix},
    }  # fmt: skip
    values = [5, "fixed", 4, 2.0, 1.0, "any", True, "", False]
    workflow = {"nodes": [{"id": "sample", "type": "DODE_KSampler", "widgets_values": values}]}
    return prompt, {"extra_pnginfo": {"workflow": workflow}}


def test_a_pictures_workflow_is_pinned_to_its_table_after_a_fresh_and_a_cached_run(server, object_info):
    """So whoever has the picture knows which file to ask for."""
    demo, pins = object_info["DODE_DemoModel"]["output"], []
    for prefix in ("fresh", "cached"):
        prompt, extra = auto_prompt(prefix)
        prompt["decode"]["inputs"]["vae"][1] = demo.index("VAE")
        status, reply = server.post("/prompt", {"prompt": prompt, "extra_data": extra})
        assert status == 200, reply
        result = server.result(reply["prompt_id"])
        outputs = succeeded(result)
        cached = next(
            each["nodes"] for kind, each in result["status"]["messages"] if kind == "execution_cached"
        )
        assert ("sample" in cached) == (prefix == "cached")
        (picture,) = outputs["picture"]["images"][:1]
        workflow = json.loads(Image.open(io.BytesIO(server.picture(picture))).text["workflow"])
        (node,) = workflow["nodes"]
        pins.append(node["widgets_values"][-2])
        assert node["properties"]["dode_table"] == pins[-1]
    assert pins[0] == pins[1]
    name, digits = pins[0].rsplit(" ", 1)
    (path,) = (server.pack / "lambdas").rglob(f"{name}.safetensors")
    assert LambdaTable.load(path).sha256.startswith(digits)
    assert len(digits) == 16


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (distil_prompt(steps="many"), "steps must be numbers such as"),
        (distil_prompt(save_name="../outside"), "give the table another name"),
        (distil_prompt(latents=2, positive_2=["demo", 1], positive_3=["demo", 1]), "need at least 3 latents"),
        (sample_prompt("demo_eps.safetensors", "flow"), "made for another kind of model"),
        (
            sample_prompt("demo_eps.safetensors", steps=7, strict=True),
            "than 7: this table has 2, 3, 4, 5, 6, 8, 10 and 12 steps",
        ),
    ],
)
def test_errors_are_readable(prompt, message, server):
    before = tables_in(server)
    (error,) = errors_of(server.run(prompt))
    assert message in error
    assert tables_in(server) == before


def test_a_missing_table_is_named(server):
    """ComfyUI 0.3.64 leaves it to the node; later versions refuse the graph."""
    status, reply = server.post("/prompt", {"prompt": sample_prompt("gone.safetensors")})
    said = errors_of(server.result(reply["prompt_id"])) if status == 200 else [json.dumps(reply)]
    assert "gone.safetensors" in said[0]


def test_cancel_leaves_nothing_behind(server):
    before, logged = tables_in(server), len(server.log)
    cancelled = server.queue(distil_prompt(latents=64, steps="12", scale=100, save_name="cancelled"))
    server.wait(lambda: "D-ODE teacher" in server.log[logged:], 30)
    server.post("/interrupt", {})
    result = server.result(cancelled, 20)
    assert "execution_interrupted" in [kind for kind, _ in result["status"]["messages"]]
    assert tables_in(server) == before
    succeeded(server.run(distil_prompt(save_name="after")))
    assert tables_in(server) - before == {saved_as("after", server.pack / "lambdas").name}
