"""The embedded models by name, and the demo of the one that people are shown."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dode_nodes.demo import experiment, results
from dode_nodes.demo.catalogue import NAMES, PICTURES, load_model
from dode_nodes.demo.colour.landscapes import DATASET
from dode_nodes.demo.experiment import USUAL, Usual, in_turns, settings_of
from dode_nodes.errors import DodeError
from dode_nodes.fit import race
from tests.demo.small import make_small
from tests.short_race import shorten_race

WEIGHTS = Path(str(resources.files("dode_nodes.demo") / "weights"))


@pytest.fixture(scope="module")
def pictures():
    return load_model(PICTURES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_loads_a_model_that_says_so_and_shows_its_latents(name):
    model = load_model(name)
    assert model.name == name
    latents = model.noise([0, 1])
    shown = model.pictures(latents)
    assert 0 <= shown.min() < shown.max() <= 1
    assert shown.shape == ((2, 64, 64, 3) if name == PICTURES else (2, 16, 16))
    labels = model.labels(in_turns(model.subjects, 2))
    assert model.denoiser()(latents, torch.full((2,), 0.5), labels=labels).shape == latents.shape


def test_an_unknown_name_is_refused():
    with pytest.raises(DodeError, match="'faces'"):
        load_model("faces")


def test_what_is_asked_for_are_words_that_it_knows(pictures):
    known = (pictures.labels(pictures.subjects) > 0).sum(dim=1)
    assert known.tolist() == [len(subject.split()) for subject in pictures.subjects]
    with pytest.raises(DodeError, match="'submarine'"):
        pictures.labels(["lake", "night submarine"])
    assert in_turns("abc", 5) == ["a", "b", "c", "a", "b"]


def test_colour_weights_are_small_enough_and_say_how_they_were_made():
    files = list(WEIGHTS.glob("colour_*.safetensors"))
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) <= 24_000_000
    for file in files:
        with safe_open(file, framework="pt") as weights:
            assert weights.metadata()["command"].startswith("python -m dode_nodes.demo.colour.train ")
            assert weights.metadata()["dataset"] == DATASET


def test_usual_settings_hold_where_nobody_says_otherwise(pictures):
    assert settings_of(pictures, None, None, 0) == (USUAL[PICTURES].budgets, USUAL[PICTURES].cfg)
    assert settings_of(pictures, [8, 6, 8], 1.5, 0) == ((6, 8), 1.5)
    assert settings_of(load_model("eps"), None, None, 0) == ((5, 8, 10), 2.0)
    with pytest.raises(DodeError):
        settings_of(pictures, None, math.nan, 0)


def test_its_demo_compares_pictures_in_colour_side_by_side(pictures, monkeypatch):
    drawn = []
    make_small(monkeypatch)
    shorten_race(race, monkeypatch)
    quick = Usual((2,), 5.0, latents=2, fresh_latents=3, students=("euler",), refine_budget=0)
    monkeypatch.setitem(USUAL, PICTURES, quick)
    monkeypatch.setattr(results, "picture_grid", lambda rows, blocks: drawn.append((rows, blocks)))
    with torch.inference_mode():
        demo = experiment.run_demo(pictures, latents=2, fresh_latents=3)
    results.grid_figure(demo)
    ((rows, (block,)),) = drawn  # no block of differences
    assert block.columns == list(pictures.subjects[:3])
    assert [row.images.shape for row in rows] == [(3, 64, 64, 3)] * 4
    euler, _, _, converged = (row.images for row in rows)
    assert np.abs(euler - converged).max() > 0.1
    assert demo.table.model["name"] == "embedded pictures"
    told = json.loads(json.dumps(results.demo_json(demo, "a command", 1.0)))
    assert told["settings"]["model"] == PICTURES
    assert told["settings"]["subjects"] == list(pictures.subjects)
