"""How a row came about, as data: what is no such thing is refused, and JSON brings back the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dode_nodes.errors import DodeError
from dode_nodes.tables import provenance
from dode_nodes.tables.provenance import (
    Credit,
    Distances,
    HeldOutErrors,
    Lora,
    Origin,
    StockSetting,
    TrainedLora,
    Unseen,
)
from tests.tables import rows
from tests.tables.rows import BEGAN

SHA = "0123456789abcdef" * 4
STOCK = {"sampler": "a", "scheduler": "b", "error": 0.1, "latents": 4}
DISTANCES = {"rms": 0.2, "median": 0.2, "low": 0.1, "high": 0.3}
UNSEEN = {"latents": 4, "dode": DISTANCES, "stock": DISTANCES, "nearer": 0.75}
NAN = float("nan")
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
    (HeldOutErrors, {"latents": 4, "dode": [0.1], "later_stock": [-1]}, "numbers of at least 0"),
    (StockSetting, STOCK | {"error": NAN}, "needs an error"),
    (StockSetting, STOCK | {"latents": 4.5}, "needs an error"),
    (StockSetting, STOCK | {"tried": 0}, "'tried' must be a number of settings"),
    (StockSetting, STOCK | {"tried": 2.5}, "'tried' must be a number of settings"),
    *((Distances, DISTANCES | {name: -0.1}, "distances must be numbers of at least 0") for name in DISTANCES),
    *((Distances, DISTANCES | {name: NAN}, "distances must be numbers of at least 0") for name in DISTANCES),
    (Unseen, UNSEEN | {"dode": None}, "'unseen': 'dode' must be an object"),
    (Unseen, UNSEEN | {"stock": DISTANCES | {"low": -1}}, "distances must be numbers of at least 0"),
    (Unseen, UNSEEN | {"stock": {"rms": 1}}, "'unseen': 'stock': .*missing"),
    (Unseen, UNSEEN | {"latents": 0}, "'unseen' needs the number of latents"),
    (Unseen, UNSEEN | {"latents": 0.5}, "'unseen' needs the number of latents"),
    (Unseen, UNSEEN | {"nearer": "x"}, "'nearer' must be a number from 0 to 1"),
    (Unseen, UNSEEN | {"nearer": -0.1}, "'nearer' must be a number from 0 to 1"),
    (Unseen, UNSEEN | {"nearer": 1.1}, "'nearer' must be a number from 0 to 1"),
    (Unseen, UNSEEN | {"stock_needs": 0}, "'stock_needs' must be a number of evaluations"),
    (Unseen, UNSEEN | {"stock_needs": 2.5}, "'stock_needs' must be a number of evaluations"),
    (Unseen, UNSEEN | {"to_others": -0.1}, "'to_others' must be a number of at least 0"),
    (Unseen, UNSEEN | {"to_others": "x"}, "'to_others' must be a number of at least 0"),
    (Credit, {"author": "two\nlines"}, "author and licence must be a line each"),
    (Credit, {"licence": 3}, "author and licence must be a line each"),
    (Credit, {"notes": "\u202eback"}, "author and licence must be a line each"),
    (Credit, {"date": "31.1.2026"}, "a date must be written as 2026-01-31"),
    (Credit, {"date": "2026-01-31 "}, "a date must be written as 2026-01-31"),
    (Credit, {"date": 20260131}, "a date must be written as 2026-01-31"),
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


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        (StockSetting, STOCK | {"error": 0, "latents": 1, "tried": 1}),
        (
            Unseen,
            UNSEEN
            | {
                "dode": dict.fromkeys(DISTANCES, 0),
                "latents": 1,
                "nearer": 0,
                "stock_needs": 1,
                "to_others": 0,
            },
        ),
        (Unseen, UNSEEN | {"nearer": 1}),
        (TrainedLora, TRAINED | {"error": 0, "error_without": 0, "latents": 1}),
        (HeldOutErrors, {"latents": 1, "dode": [0, None], "stock": 0, "later_stock": [0]}),
        (Credit, {"notes": "two\nlines", "date": "2026-12-31"}),
    ],
    ids=str,
)
def test_the_least_and_the_most_of_each_comes_back_from_json(kind, facts):
    part = kind(**facts)
    assert provenance.read(kind, json.loads(json.dumps(part.to_json())), "it") == part
    assert {name: value for name, value in part.to_json().items() if name in facts} == facts


def test_what_is_not_there_is_not_written():
    assert Credit().to_json() == {}
    assert HeldOutErrors(4, (0.1,)).to_json() == {"latents": 4, "dode": [0.1], "stock": None}
    assert "tried" not in StockSetting(**STOCK).to_json()
    assert Unseen(**UNSEEN).to_json() == UNSEEN
    assert "solver_options" not in Origin("refined", "euler", {}, (2.0, 1.0, 0.0)).to_json()


def test_the_plain_solvers_errors_are_known_if_they_were_measured():
    assert HeldOutErrors(4, (0.1, 0.2), 0.3).of_plain is None
    measured = HeldOutErrors(4, [0.1, 0.2], 0.3, [0.4])
    assert measured.of_plain == HeldOutErrors(4, (0.3, 0.4), 0.3)
    assert (measured.dode, measured.later_stock) == ((0.1, 0.2), (0.4,))  # tuples: nobody changes them
    whole = HeldOutErrors.of_whole(4, 3, NAN, 0.5)
    assert whole == HeldOutErrors(4, (None, None, None), 0.5)
    assert HeldOutErrors.of_whole(4, 1, 0.25, float("inf")) == HeldOutErrors(4, (0.25,))


def test_distances_say_how_they_are_spread():
    distances = Distances.over(np.arange(11.0))
    assert distances == Distances(np.sqrt(35.0), 5.0, 1.0, 9.0)


def test_a_row_far_from_its_teachers_picture_makes_another():
    """0.8 times the distance to the others is the limit; without others nothing is said."""
    assert Unseen(**UNSEEN).corresponds
    assert Unseen(**UNSEEN, to_others=0.2501).corresponds
    assert not Unseen(**UNSEEN, to_others=0.2499).corresponds


def test_a_stock_settings_sampler_is_taken_apart():
    assert StockSetting(**STOCK).solver_and_options() == ("a", {})
    solver, options = StockSetting(
        **STOCK | {"sampler": "gradient_estimation, ge_gamma 1.5"}
    ).solver_and_options()
    assert (solver, dict(options)) == ("gradient_estimation", {"ge_gamma": 1.5})
    options = StockSetting(**STOCK | {"sampler": "deis, max_order 2"}).solver_and_options()[1]
    assert options == {"max_order": 2}
    assert type(options["max_order"]) is int
    with pytest.raises(DodeError, match="a stock setting's options: 'deis' is not known to take"):
        StockSetting(**STOCK | {"sampler": "deis, eta 2"}).solver_and_options()
    for words in ("deis, max_order", "deis, max_order x", "deis, max_order 1.x"):
        with pytest.raises(DodeError, match="a stock setting's options are no numbers"):
            StockSetting(**STOCK | {"sampler": words}).solver_and_options()


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
