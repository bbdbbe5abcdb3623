"""How a row came about, as data: what is no such thing is refused, and JSON brings back the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dode_nodes.errors import DodeError
from dode_nodes.tables import provenance
from dode_nodes.tables.provenance import HeldOutErrors, Lora, Origin, StockSetting, TrainedLora
from tests.tables import rows
from tests.tables.rows import BEGAN

SHA = "0123456789abcdef" * 4
TRAINED = {"content": SHA, "strength": 1.0, "error": 0.1, "error_without": 0.2, "latents": 4}

WRONG = [
    (Origin, {"kind": "guessed"}, 'origin must be one of .*not "guessed"'),
    (Origin, {"kind": ["plain"]}, "origin must be one of"),
    (Origin, {"kind": None}, "origin must be one of"),
    (Origin, {"solver": "heun"}, "must have both the solver and the sigmas"),
    (Origin, {"sigmas": [2, 1, 0]}, "must have both the solver and the sigmas"),
    (Origin, BEGAN | {"solver": 3}, "solver must be a name"),
    (Origin, BEGAN | {"solver": ""}, "solver must be a name"),
    (Origin, BEGAN | {"solver": "<img src=x>"}, "solver must be a name"),
    (Origin, BEGAN | {"solver_options": [["a", 1]]}, "options must be an object"),
    (Origin, BEGAN | {"solver_options": None}, "options must be an object"),
    (Origin, BEGAN | {"sigmas": "8 4 2 0"}, "sigmas must be numbers"),
    (Origin, BEGAN | {"sigmas": [8.0, [4.0], 2.0, 0.0]}, "sigmas must be numbers"),
    (Origin, BEGAN | {"sigmas": [10**400, 4.0, 2.0, 0.0]}, "sigmas must be numbers"),
    (Origin, BEGAN | {"sigmas": [4.0, 8.0, 0.0]}, "sigmas must descend"),
    (HeldOutErrors, {"latents": 0, "dode": [0.1]}, "need the number of latents"),
    (HeldOutErrors, {"latents": True, "dode": [0.1]}, "need the number of latents"),
    (HeldOutErrors, {"latents": "4", "dode": [0.1]}, "need the number of latents"),
    (HeldOutErrors, {"latents": 4, "dode": [-0.1]}, "numbers of at least 0"),
    (HeldOutErrors, {"latents": 4, "dode": ["x"]}, "numbers of at least 0"),
    (HeldOutErrors, {"latents": 4, "dode": [True]}, "numbers of at least 0"),
    (HeldOutErrors, {"latents": 4, "dode": [float("nan")]}, "numbers of at least 0"),
    (HeldOutErrors, {"latents": 4, "dode": [0.1], "stock": -1}, "numbers of at least 0"),
    (HeldOutErrors, {"latents": 4, "dode": [0.1], "stock": [1]}, "numbers of at least 0"),
    (StockSetting, {"sampler": 3, "scheduler": "b", "error": 0.1, "latents": 4}, "names of a sampler"),
    (StockSetting, {"sampler": "a", "scheduler": "<b", "error": 0.1, "latents": 4}, "names of a sampler"),
    (StockSetting, {"sampler": "a", "scheduler": "b", "error": -1, "latents": 4}, "needs an error"),
    (StockSetting, {"sampler": "a", "scheduler": "b", "error": None, "latents": 4}, "needs an error"),
    (StockSetting, {"sampler": "a", "scheduler": "b", "error": 0.1, "latents": 0}, "needs an error"),
    (
        StockSetting,
        {"sampler": "a", "scheduler": "b", "error": 0.1, "latents": 4, "discard_penultimate": 1},
        "discard_penultimate must be true or false",
    ),
    (Lora, {"sha256": SHA[1:]}, "needs the SHA-256"),
    (Lora, {"sha256": SHA.upper()}, "needs the SHA-256"),
    (Lora, {"sha256": ["a"] * 64}, "needs the SHA-256"),
    (Lora, {"sha256": SHA, "strength": "1"}, "strength must be a number"),
    (Lora, {"sha256": SHA, "strength": float("inf")}, "strength must be a number"),
    (Lora, {"sha256": SHA, "name": 3}, "its name must be text"),
    (TrainedLora, TRAINED | {"content": SHA[1:]}, "needs the hash"),
    (TrainedLora, TRAINED | {"content": 3}, "needs the hash"),
    (TrainedLora, TRAINED | {"strength": None}, "'strength' must be a number"),
    (TrainedLora, TRAINED | {"error": -0.1}, "numbers of at least 0"),
    (TrainedLora, TRAINED | {"error_without": float("nan")}, "numbers of at least 0"),
    (TrainedLora, TRAINED | {"latents": 0}, "number of latents"),
    (TrainedLora, TRAINED | {"name": "two\nlines"}, "'name' text"),
]


@pytest.mark.parametrize(("kind", "facts", "why"), WRONG)
def test_what_is_no_such_thing_is_refused(kind, facts, why):
    with pytest.raises(DodeError, match=why):
        kind(**facts)
    with pytest.raises(DodeError, match=why):
        provenance.read(kind, facts, "it")


@pytest.mark.parametrize("kind", [Origin, HeldOutErrors, StockSetting, Lora, TrainedLora])
@pytest.mark.parametrize("facts", [None, 3, "text", [], [["kind", "plain"]]])
def test_a_part_is_an_object(kind, facts):
    with pytest.raises(DodeError, match=r"^'x' must be an object$"):
        provenance.read(kind, facts, "'x'")


def test_a_missing_field_is_named():
    for kind, facts, name in ((HeldOutErrors, {"latents": 4}, "dode"), (Lora, {"strength": 1}, "sha256")):
        with pytest.raises(DodeError, match=f"^'x': .*{name}"):
            provenance.read(kind, facts, "'x'")
    with pytest.raises(DodeError, match=r"^'errors': "):
        provenance.read(HeldOutErrors, {"latents": 4, "dode": 0.1}, "'errors'")


def test_fields_of_a_later_version_are_left_out():
    assert provenance.read(Lora, {"sha256": SHA, "rank": 8}, "it") == Lora(SHA)


parts = (
    st.builds(HeldOutErrors, st.integers(1, 9), st.lists(st.none() | st.floats(0, 9)), st.none())
    | rows.stock_settings
    | rows.loras
    | rows.trained_loras
)


@settings(max_examples=50, deadline=None)
@given(part=parts)
def test_json_brings_back_the_same(part):
    assert provenance.read(type(part), json.loads(json.dumps(part.to_json())), "it") == part


def test_an_origin_comes_back_from_json():
    for kind in provenance.KINDS:
        assert provenance.read(Origin, Origin(kind).to_json(), "it").to_json() == {"kind": kind}
    again = provenance.read(Origin, json.loads(json.dumps(Origin("refined", **BEGAN).to_json())), "it")
    assert (again.kind, again.solver, again.solver_options) == ("refined", "ipndm", {"max_order": 2})
    np.testing.assert_array_equal(again.sigmas, BEGAN["sigmas"], strict=False)


def test_an_origin_is_detached_from_what_it_was_made_of():
    sigmas, options = np.array([2.0, 1.0, 0.0]), {"max_order": 1}
    origin = Origin("refined", "ipndm", options, sigmas)
    sigmas[0], options["max_order"] = 9, 9
    assert origin.to_json() == {
        "kind": "refined",
        "solver": "ipndm",
        "solver_options": {"max_order": 1},
        "sigmas": [2, 1, 0],
    }
    with pytest.raises(ValueError, match="read-only"):
        origin.sigmas[0] = 3
