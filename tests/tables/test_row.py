"""Rows: validated, frozen, found by σ, known by a hash of what they sample, and honest about how they began."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dode_nodes.errors import DodeError
from dode_nodes.tables.provenance import HeldOutErrors, Lora, Origin, StockSetting, TrainedLora
from dode_nodes.tables.row import MAX_EVALUATIONS, LambdaRow, shown_hash
from tests.tables import rows
from tests.tables.rows import BEGAN, SIGMAS, refined_row, row_of


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"solver": ""}, "solver must be a name"),
        ({"solver": 3}, "solver must be a name"),
        ({"solver": "<img src=x onerror=alert(1)>"}, "solver must be a name"),
        ({"prediction": "eps"}, 'prediction must be one of .*not "eps"'),
        ({"form": "triangle"}, r"form must be one of \('lambda', 'history'\), not \"triangle\""),
        ({"sigmas": [4.0, 8.0, 2.0, 0.0]}, "must descend"),
        ({"sigmas": [8.0, 4.0, 4.0, 0.0]}, "with no value repeated"),
        ({"sigmas": [8.0, 4.0, 2.0, 1.0]}, "to 0"),
        ({"sigmas": [8.0, 4.0, 2.0, float("nan")]}, "sigmas has NaN"),
        ({"sigmas": [[8.0, 4.0, 2.0, 0.0]]}, "must descend"),
        ({"sigmas": ["a", "b"]}, "sigmas must be numbers"),
        ({"sigmas": [10**400, 0]}, "sigmas must be numbers"),
        ({"sigmas": [0.0], "evaluations": ()}, "must descend"),
        ({"evaluations": (1, 1)}, "evaluations must be 3 whole numbers"),
        ({"evaluations": (1, 1, 1.0)}, "evaluations must be 3 whole numbers"),
        ({"evaluations": (1, 1, True)}, "evaluations must be 3 whole numbers"),
        ({"evaluations": (1, -1, 3)}, "evaluations must be 3 whole numbers"),
        ({"evaluations": (0, 2, 1)}, "at least one in its first step"),
        ({"evaluations": (255, 1, 1), "weights": np.zeros(257)}, "1 to 256 evaluations"),
        (
            {"sigmas": np.linspace(1, 0, 258), "evaluations": (1,) + (0,) * 256, "weights": [0]},
            "at most 256 steps; got 257",
        ),
        ({"weights": np.zeros(4)}, r"weights of shape \(4,\) do not fit 3 evaluations in the form 'lambda'"),
        ({"weights": np.zeros((3, 0))}, "do not fit"),
        ({"weights": np.zeros((3, 4))}, "do not fit"),
        ({"weights": np.zeros((3, 3, 4)), "form": "history"}, "do not fit"),
        ({"weights": np.zeros((3, 3)), "form": "history", "evaluations": (2, 1, 1)}, "do not fit 4"),
        ({"weights": np.ones((3, 3)), "form": "history"}, "lower triangle"),
        ({"weights": np.array([0, 0.1, np.inf])}, "weights has NaN or infinite"),
        ({"weights": np.array([0, 0.1, 1e300])}, r"λ must be at most 1000; got 1e\+300"),
        ({"weights": np.array([0, -1000.1, 0])}, "λ must be at most 1000; got 1000"),
        (
            {"weights": np.tri(3) * 400, "form": "history"},
            "weights of one evaluation together .* 1000; got 1200",
        ),
        ({"weights": np.tri(3) * [[[400]], [[-200]]], "form": "history"}, "together .* 1000; got 1800"),
        ({"weights": np.tri(3) * 1e308, "form": "history"}, "together .* 1000; got inf"),
        (
            {"sigmas": np.array([1e300, 4.0, 2.0, 0.0])},
            r"sigmas must be at most 65,504; the first is 1e\+300",
        ),
        ({"sigmas": np.array([65505.0, 4.0, 2.0, 0.0])}, "must be at most 65,504"),
        ({"sigmas": np.array([8.0, 4.0, 4 - 1e-9, 0.0])}, "no value repeated in single precision"),
        ({"sigmas": np.array([8.0, 4.0, 1e-50, 0.0])}, "no value repeated in single precision"),
        ({"solver_options": {"s_churn": 1}}, "'euler' is not known to take the option \"s_churn\""),
        ({"settings": {"x": {1}}}, "settings cannot be stored as JSON"),
        ({"settings": {"cfg": "7"}}, "settings: 'cfg' cannot be \"7\""),
        ({"report": {"x": float("nan")}}, "report cannot be stored as JSON"),
        ({"report": {"checked": 1}}, "report: 'checked' cannot be 1"),
        ({"solver_options": [1, 2]}, "solver_options must be an object"),
        ({"unknown_arrays": {"names": np.array(["a"])}}, "'names' must hold numbers"),
        ({"errors": HeldOutErrors(4, (0.1, 0.2))}, "a row of 3 steps must have 3 held-out errors"),
        (
            {"errors": HeldOutErrors(4, (0.1, 0.2, 0.3), 0.4, (0.1,))},
            "'later_stock' must be empty or one error for each of 2 later starts",
        ),
        (
            {"origin": Origin("refined", "heun", {}, [9, 4, 2, 0])},
            "must start at the σ of the row before refining",
        ),
        ({"origin": Origin("refined", "heun", {}, [8, 4, 0])}, "as many steps as the row before refining"),
    ],
)
def test_invalid_row_is_refused(changes, why):
    facts = {"solver": "euler", "sigmas": SIGMAS, "evaluations": (1, 1, 1), "weights": np.zeros(3)} | changes
    with pytest.raises(DodeError, match=why):
        LambdaRow(**facts)


def test_largest_row():
    sigmas = np.linspace(1, 0, MAX_EVALUATIONS + 1)
    row = LambdaRow("euler", sigmas, (1,) * MAX_EVALUATIONS, np.tri(MAX_EVALUATIONS), form="history")
    assert (row.steps, row.nfe) == (256, 256)


def test_row_is_frozen_and_detached_from_what_it_was_made_of():
    sigmas, weights, options = np.array(SIGMAS), np.zeros(3), {"max_order": 1}
    row = LambdaRow("ipndm", sigmas, [1, 1, 1], weights, solver_options=options)
    sigmas[0], weights[0], options["max_order"] = 99, 99, 99
    assert row.sigmas[0] == 8.0
    assert row.weights[0] == 0.0
    assert row.solver_options == {"max_order": 1}
    assert row.evaluations == (1, 1, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.solver = "heun"
    with pytest.raises(ValueError, match="read-only"):
        row.weights[0] = 1
    with pytest.raises(TypeError):
        row.settings["a"] = 1


def test_what_a_row_says_of_itself():
    row = row_of("heun", SIGMAS, (2, 2, 1), weights=np.array([0, 0.1234, -3, 0.5, 0]))
    assert (row.steps, row.nfe, row.is_callable) == (3, 5, False)
    assert [row.first_evaluation(i) for i in range(4)] == [0, 2, 4, 5]
    assert row.requires == ["lambda"]
    assert row.label == "heun, 3 steps (5 evaluations, noise)"
    assert repr(row) == f"<LambdaRow {row.label}: λ = 0, 0.123, -3, 0.5, 0>"

    triangle = row_of("<mine>", weights=np.tri(3), form="history")
    assert triangle.is_callable
    assert triangle.requires == ["history"]
    assert "weights of shape (3, 3)" in repr(triangle)


def test_rows_are_equal_if_everything_is():
    assert row_of() == row_of()
    different = [
        row_of("heun"),
        row_of(weights=np.array([0, 0.1, 0.2 + 1e-16])),
        row_of(sigmas=(8.0, 4.0, 2.5, 0.0)),
        row_of(settings={"cfg": 1}),
        row_of(error=0.1),
        row_of(origin=Origin("plain")),
        row_of(loras=[Lora("0" * 64)]),
        row_of(trained_lora=TrainedLora("0" * 64, 1.0, 0.1, 0.2, 4)),
        row_of(unknown_arrays={"x": np.zeros(1)}),
        row_of(unknown_arrays={"x": np.zeros(1, "f4")}),
    ]
    for a, b in itertools.combinations([row_of(), *different], 2):
        assert a != b
    assert row_of() != "a row"


@settings(max_examples=25, deadline=None)
@given(row=rows.rows())
def test_row_survives_json_copies_and_pickling(row):
    again = LambdaRow.from_json(json.loads(json.dumps(row.to_json())), row.arrays())
    assert again == row
    assert again.sha256 == row.sha256
    for field in dataclasses.fields(LambdaRow):
        a, b = getattr(again, field.name), getattr(row, field.name)
        if field.name == "origin":
            a, b = a.to_json(), b.to_json()
        if field.name == "free":
            assert a.requires == b.requires
            a, b = a.arrays, b.arrays
            assert a.keys() == b.keys()
            a, b = list(a.values()), list(b.values())
            for one, other in zip(a, b, strict=True):
                np.testing.assert_array_equal(one, other)
            continue
        if field.name != "unknown_arrays":
            np.testing.assert_array_equal(a, b)
    assert copy.deepcopy(row) == copy.copy(row) == pickle.loads(pickle.dumps(row)) == row  # noqa: S301


# --- What a reader must know --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["per-channel", "told-sigmas", "guidance", "quantum"])
def test_a_row_that_requires_what_is_not_known_is_refused_by_name(name):
    facts = row_of().to_json()
    facts["requires"] = ["lambda", name]
    with pytest.raises(DodeError, match=f"^it requires '{name}', which this version does not know: update$"):
        LambdaRow.from_json(facts, row_of().arrays())


# --- The hash -----------------------------------------------------------------------------------------


def test_the_hash_is_of_all_that_is_sampled():
    same_bytes = {"sigmas": (8.0, 0.0)}  # of one evaluation both forms have one number
    options = [row_of("ipndm", solver_options={"max_order": order}) for order in (2, 3)]
    pairs = {
        "solver": (row_of(), row_of("heun")),
        "options": (row_of("ipndm"), options[0]),
        "an option": options,
        "prediction": (row_of(), row_of(prediction="data")),
        "form": (row_of(weights=[1], **same_bytes), row_of(weights=[[1]], form="history", **same_bytes)),
        "evaluations": (
            row_of(evaluations=(2, 1, 1), weights=[0] * 4),
            row_of(evaluations=(1, 2, 1), weights=[0] * 4),
        ),
        "sigmas": (row_of(), row_of(sigmas=(8.0, 4.0, np.nextafter(2.0, 3), 0.0))),
        "weights": (row_of(weights=[0, 0, 0.1]), row_of(weights=[0, 0, np.nextafter(0.1, 1)])),
    }
    for what, (a, b) in pairs.items():
        assert a.sha256 != b.sha256, what


def test_the_hash_is_of_nothing_else():
    row = row_of()
    others = [
        row_of(report={"checked": True}),
        row_of(settings={"cfg": 2}),
        row_of(unknown={"note": "mine"}),
        row_of(unknown_arrays={"x": np.ones(3)}),
        row_of(error=0.1),
        row_of(origin=Origin("refined", **BEGAN)),
        row_of(best_stock=StockSetting("heun", "karras", 0.1, 4)),
        row_of(loras=[Lora("0" * 64)]),
        row_of(trained_lora=TrainedLora("0" * 64, 1.0, 0.1, 0.2, 4)),
    ]
    for other in others:
        assert other != row
        assert other.sha256 == row.sha256


def test_the_hash_can_be_calculated_by_any_program():
    """As docs/table-format.md says it; and the hash of a row never changes."""
    row = row_of("<λ>", solver_options={"n": 0.5, "max_order": 2}, prediction="data")
    text = r'[["lambda"], "<\u03bb>", {"max_order": 2, "n": 0.5}, [1, 1, 1], "data", "lambda"]'
    numbers = struct.pack("<7d", *SIGMAS, 0, 0.1, 0.2)
    assert row.sha256 == hashlib.sha256(text.encode() + numbers).hexdigest()
    assert shown_hash(row.sha256) == "69e620ee"


# --- Where it came from -------------------------------------------------------------------------------


def test_a_refined_row_serves_the_solver_it_began_with_and_is_measured_against_it():
    row = refined_row()
    assert (row.is_refined, row.has_own_sigmas) == (True, True)
    plain = row.plain
    assert (plain.solver, plain.solver_options, plain.form) == ("ipndm", {"max_order": 2}, "lambda")
    assert plain.origin.kind == "plain"
    assert plain.sigmas.tolist() == BEGAN["sigmas"]
    assert not plain.weights.any()
    assert [row.serves(solver) for solver in ("euler", "ipndm", "heun")] == [True, True, False]
    assert row.label == (
        "euler, 3 steps (3 evaluations, noise, weights over the history, refined from ipndm)"
    )
    greedy = row_of("heun", evaluations=(2, 2, 1))
    assert (greedy.is_refined, greedy.has_own_sigmas, greedy.serves("heun")) == (False, False, True)
    assert greedy.plain == row_of("heun", evaluations=(2, 2, 1), weights=np.zeros(5), origin=Origin("plain"))


def test_a_solver_of_several_stages_keeps_its_evaluations_when_refined():
    origin = Origin("refined", "heun", {}, SIGMAS)
    row = row_of("heun", evaluations=(2, 2, 1), origin=origin)
    assert (row.is_refined, row.has_own_sigmas) == (True, False)
    assert row.plain == row_of("heun", evaluations=(2, 2, 1), weights=np.zeros(5), origin=Origin("plain"))


@pytest.mark.parametrize("kind", ["distilled", "plain"])
def test_what_was_not_fitted_end_to_end_is_not_refined(kind):
    row = row_of(origin=Origin(kind))
    assert not row.is_refined
    assert "refined" not in row.label
    assert row.plain == row_of(weights=np.zeros(3), origin=Origin("plain"))


@pytest.mark.parametrize("kept", ["Jacobian 2", "row given", "plain solver"])
def test_a_report_makes_no_refined_row(kept):
    """It is for people; the origin decides."""
    row = row_of(report={"refined": {"kept": kept}})
    assert not row.is_refined
    assert refined_row(report={"refined": {"kept": kept}}).is_refined


def test_errors_from_each_step():
    inf = float("inf")
    row = row_of(error=(0.3, None, 0.1))
    assert [row.error_from(step) for step in range(3)] == [0.3, inf, 0.1]
    assert row.error_from() == 0.3
    assert row_of(error=0.0).error_from() == 0.0
    assert [row_of().error_from(step) for step in range(3)] == [inf] * 3


# --- Finding ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(row=rows.rows(), data=st.data())
def test_every_part_is_found_at_its_step(row, data):
    gaps = np.diff(row.sigmas[:-1]) / row.sigmas[1:-1] if row.steps > 1 else np.array([-1.0])
    if (np.abs(gaps) < 1e-3).any():
        return  # σ that hosts could not tell apart
    noise = data.draw(st.sampled_from([0.0, 1e-7, -3e-5]))
    for i in range(row.steps):
        for end in range(i + 2, row.steps + 2):
            part = torch.tensor(row.sigmas[i:end] * (1 + noise)).float()
            match = row.find(part)
            if row.evaluations[i]:
                assert (match.row, match.step) == (row, i)
            else:
                assert match.row is None
                assert f"cannot start at step {i}" in match.why


def test_reasons_of_a_match():
    row = row_of()
    assert row.find(SIGMAS).why == "the whole schedule of euler, 3 steps (3 evaluations, noise)"
    assert row.find(SIGMAS[1:]).why.startswith("steps 1 to 2 of euler")
    assert row.find(SIGMAS[:2]).why.startswith("steps 0 to 0 of euler")
    assert row.find([3.0, 0.0]).why.startswith(
        "no step of euler, 3 steps (3 evaluations, noise) starts at σ = 3"
    )
    assert row.find([8.0, 2.0, 0.0]).why.startswith("σ = 2 at position 1 is not in euler")
    assert row.find([8.0, 4.0, 2.0, 0.0, -1.0]).why.startswith("σ = -1 at position 4 is not in")
    assert row.find([0.0, 0.0]).row is None
    assert row.find([8.0]).why == row.find([]).why == "these σ make no step"
