"""What the host offers of ours: the sampler, the accordion, the axis, infotext."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from tests.hosts.webui.in_host.boot import module_of
from tests.hosts.webui.in_host.pictures import COMMON, runner


def test_the_sampler_is_offered_once_however_often_the_ui_is_reloaded():
    """By the calls of the host's own "Reload UI"."""
    from modules import script_callbacks, scripts, sd_samplers

    stock = [each.name for each in sd_samplers.all_samplers if each.name != "D-ODE"]
    held, map_ = sd_samplers.all_samplers, sd_samplers.all_samplers_map
    for _ in range(2):
        assert sd_samplers.visible_sampler_names()[-1] == "D-ODE"
        assert sd_samplers.samplers_map["d-ode"] == "D-ODE"
        assert sd_samplers.get_sampler_and_scheduler("D-ODE", "Automatic") == ("D-ODE", "Automatic")
        script_callbacks.script_unloaded_callback()
        assert [each.name for each in sd_samplers.all_samplers] == stock
        assert "D-ODE" not in sd_samplers.all_samplers_map
        scripts.reload_scripts()
        script_callbacks.before_ui_callback()
    assert sd_samplers.all_samplers is held
    assert sd_samplers.all_samplers_map is map_
    assert [each.name for each in held] == [*stock, "D-ODE"]
    plots = [data.module for data in scripts.scripts_data if hasattr(data.module, "axis_options")]
    assert [[option.label for option in plot.axis_options].count("[D-ODE] λ table") for plot in plots] == [1]
    assert [data.path.rpartition("/")[2] for data in scripts.scripts_data].count("dode_webui.py") == 1


def test_nothing_that_samples_or_fits_is_imported_before_it_is_used(booted):
    assert "dode_nodes.hosts.webui.extension" in booted
    used_later = {
        f"dode_nodes.hosts.webui.{name}" for name in ("sampler", "picture", "job", "distilling", "passes")
    }
    assert not booted & (
        used_later | {"dode_nodes.sampling.sample", "dode_nodes.fit.pipeline", "dode_nodes.tables.table"}
    )


def test_a_grid_of_tables(save, make, monkeypatch):
    """By the host's own X/Y/Z plot: each picture is the one that its table makes, and says so."""
    from modules import processing, scripts, shared

    from dode_nodes.hosts.webui import axis

    save("mine", 4)
    save("other", 4, lam=-0.5)
    axis.add()
    plot = next(data.module for data in scripts.scripts_data if hasattr(data.module, "axis_options"))
    ours = [option for option in plot.axis_options if option.label == "[D-ODE] λ table"]
    assert ours[0].choices()[:2] == ["auto", "none"]
    assert {"mine", "other"} < set(ours[0].choices())
    script = plot.Script()
    script.current_axis_options = [plot.axis_options[0], *ours]  # the first is none
    names = ["none", "mine", "other"]
    given = {
        "x_type": 1, "x_values_dropdown": names, "include_lone_images": True, "no_fixed_seeds": True,
    }  # fmt: skip
    asked = [name for name in inspect.signature(script.run).parameters if name != "p"]
    empty = {
        name: [] if name.endswith("dropdown") else "" if name.endswith("_values") else 0 for name in asked
    }
    monkeypatch.setitem(shared.opts.data, "grid_save", False)
    p = processing.StableDiffusionProcessingTxt2Img(**COMMON)
    p.scripts, p.script_args = runner(scripts, "auto")
    shared.state.begin(job="a grid")
    try:
        done = script.run(p, **empty | {name: value for name, value in given.items() if name in asked})
    finally:
        shared.state.end()
    alone = [make(name) for name in names]
    pictures = [np.asarray(image) for image in done.images[-3:]]
    assert all(np.array_equal(each, one.pixels) for each, one in zip(pictures, alone, strict=True))
    assert len({one.pixels.tobytes() for one in alone}) == 3
    said = [next(part for part in text.split(", ") if "D-ODE table" in part) for text in done.infotexts[-3:]]
    assert [each.split()[2] for each in said] == names


def test_pasting_an_infotext_makes_the_same_picture(save, make):
    from modules.infotext_utils import parse_generation_parameters

    save("a, b: c/mine", 4, 8)
    first = make("a, b: c/mine", steps=6)
    read = parse_generation_parameters(first.text)
    assert read["Sampler"] == "D-ODE"
    assert read["Steps"] == "8"
    again = make(read["D-ODE table"], steps=int(read["Steps"]))
    assert torch.equal(first.latents, again.latents)
    assert again.text == first.text


def test_a_pasted_name_means_its_numbers_wherever_they_lie(save, make, lambdas):
    first = make("mine " + save("mine", 4).sha256[:8])
    (lambdas / "mine.safetensors").rename(lambdas / "renamed.safetensors")
    save("mine", 4, lam=-0.5)
    pin = next(line for line in first.text.split(", ") if line.startswith("D-ODE table")).partition(": ")[2]
    assert torch.equal(make(pin).latents, first.latents)


def test_a_missing_table_is_named_and_stock_runs(make):
    picture = make("gone 1a2b3c4d")
    assert "DPM++ 2M runs: the λ table 'gone 1a2b3c4d' is not in" in picture.said
    assert torch.equal(picture.latents, make("none").latents)


@pytest.mark.parametrize(
    "name", ["../../config", "/etc/passwd", "..\\same", "C:mine", "", 7, ["mine"], "\x1b[31m"]
)
def test_names_of_strangers_are_looked_up_and_never_opened(name, make, monkeypatch):
    from dode_nodes.tables import safefile

    opened: list[Any] = []
    monkeypatch.setattr(safefile, "read", lambda path: opened.append(path))
    picture = make(name)
    assert "DPM++ 2M runs" in picture.said
    assert opened == []
    assert "\x1b" not in picture.said


def test_the_accordion_names_tables_and_takes_what_it_does_not_have(save):
    import gradio as gr

    from dode_nodes.hosts.webui.extension import DodeScript

    save("deep/mine", 4)
    script = DodeScript()
    with gr.Blocks():
        (table,) = script.ui(False)
    choices = [each[0] if isinstance(each, (tuple, list)) else each for each in table.choices]
    assert choices == ["auto", "none", "deep/mine"]  # none of ComfyUI's demo models
    assert (table.value, table.allow_custom_value) == ("auto", True)
    assert script.infotext_fields == [(table, "D-ODE table")]
    assert script.paste_field_names == ["D-ODE table"]
    assert module_of("dode_webui.py").DodeScript is DodeScript


def test_what_a_fit_keeps_is_found_again(tmp_path):
    """By old libraries, too: safetensors 0.4.2 writes no valid file without tensors."""
    from dode_nodes.tables.kept import Kept
    from dode_nodes.tables.notes import Notes

    kept = Kept(tmp_path, "ab" * 32, Notes(tmp_path / "notes.jsonl"))
    for name, tensors in {"none": {}, "one": {"x": torch.ones(2)}}.items():
        kept.part(name).save(tensors, {"number": 1})
        again, facts = kept.part(name).load()
        assert facts == {"number": 1}
        assert list(again) == list(tensors)
