"""The gate: what a name promises is kept, or refused by that name; what is unknown passes through unharmed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings

from dode_nodes.errors import DodeError
from dode_nodes.tables import gate
from tests.tables import rows

NUMBERS = [0, -1, 2.5, -1e308, 2**62]
NO_NUMBERS = ["1", None, True, [1], {}, 10**400, 2**63, math.nan, math.inf]


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers(value):
    assert gate.is_number(value)
    assert gate.finite(value) == value


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_no_numbers(value):
    assert not gate.is_number(value)


def test_json_has_no_nan_and_no_infinity():
    assert [gate.finite(value) for value in (None, math.nan, -math.inf)] == [None] * 3


@pytest.mark.parametrize(
    ("value", "yes"),
    [(0, True), (2**64 - 1, True), (2**64, False), (-1, False), (1.0, False), (True, False), ("1", False)],
)
def test_counts(value, yes):
    assert gate.is_count(value) == yes


@pytest.mark.parametrize(
    "name",
    [
        "euler",
        "of another pack",
        "euler, refined",
        "res_2s/ode",
        "λ",
        "<mine>",
        "<lambda>",
        "x" * 100,
        f"<{'x' * 100}>",
    ],
)
def test_names(name):
    assert gate.is_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x" * 101,
        "two\nlines",
        "\x1b[2J",
        "<",
        "<>",
        "<img src=x onerror=alert(1)>",
        "<script>alert(1)</script>",
        "<two words>",
        "<mine",
        "mine>",
        f"<{'x' * 101}>",
        "a<b>",
        "a & b",
        'a"b',
        "a'b",
        "`a`",
        "a\\b",
        "$\\frac{1}{2}$",
        "a$b$",
        "a{b",
        " a",
        "\u202egnp.exe",
        "a\u200bb",
        3,
        None,
        ["euler"],
    ],
)
def test_no_names(name):
    assert not gate.is_name(name)


def test_texts_are_short_and_steer_nothing():
    for text in (
        "<any> words\n" * 100,
        "x" * 10_000,
        "",
        "日本 שלום \N{ZERO WIDTH JOINER}",
        "\N{GRINNING FACE}",
    ):
        assert gate.is_text(text)
    steering = [
        chr(7),
        "\x1b[2J",
        "\r",
        "\t",
        "\x85",
        "\u200e",
        "\u2028",
        "\u202e",
        "\u2066",
        "\ud83d",
        "\ufeff",
    ]
    for text in ("x" * 10_001, 3, None, *steering):
        assert not gate.is_text(text)
        assert not gate.is_line(text)


def test_a_line_is_a_short_text():
    assert gate.is_line("x" * 200)
    assert not gate.is_line("x" * 201)
    assert not gate.is_line("two\nlines")


NAMES = (["euler"], [["x"], 3, None, "", "a<b", "x" * 101])
COUNTS = ([0, 4], ["4", -1, 1.5, None, [4], True])
MAYBE_NUMBERS = ([None, 0, -1.5], ["3.0", [3.0], {}, True, 10**400])

KNOWN = {
    "SETTINGS": {
        "cfg": ([0, 7.5], ["7", -1, None, [7], 10**400]),
        "teacher_cfg": ([0, 7.5], ["7", -1, None, [7], 10**400]),
        "seed": COUNTS,
        "steps": ([1, 6], [0, -1, "6", 1.5, None]),
        "scheduler": NAMES,
        "schedule": NAMES,
        "latent_shape": ([[], [4, 8, 8]], [[4, "8"], [4, 8.0], [4, 0], "4", 4, None, [1] * 9, [2**20]]),
        "dtype": NAMES,
        "latents": COUNTS,
        "groups": COUNTS,
        "prompts": COUNTS,
        "teacher": (["heun", "<mine>"], [["x"], 3, None, "<img src=x>"]),
        "scale": ([1, 40], [0, -1, "10", 1.5, None]),
        "host": NAMES,
        "host_version": NAMES,
        "package_version": NAMES,
        "cfg_range": ([[0, 0], [1.5, 7]], [[7, 1], [1], [1, 2, 3], [-1, 2], ["1", 2], 3, None]),
    },
    "MODEL": {
        "name": (["", "my <model>"], [3, None, ["x"], "x" * 201, "\u202e", "a\nb"]),
        "autov2": (["0123456789"], ["012345678", "012345678G", "0123456789a", 123, None]),
        "kind": NAMES,
        "family": NAMES,
        "prediction_type": NAMES,
        "channels": ([4], [0, "4", None, 4.0]),
        "shift": MAYBE_NUMBERS,
        "sigma_min": MAYBE_NUMBERS,
        "sigma_max": MAYBE_NUMBERS,
        "fingerprint": (
            [
                {},
                {"samples": [[0.5] * 16, [-1, *range(15)]], "ascending": 3},
                {"samples": []},
                {"layout": "89cb", "values": [0.1, 2, None], "more_values": [1.5]},
                {"x": 1},
            ],
            [
                *(None, "89cb", [], {"layout": 3}, {"layout": None}, {"values": ["0.1"]}, {"values": 0.1}),
                *({"more_values": ["1.5"]}, {"more_values": 1.5}),
                *(
                    {"samples": None},
                    {"samples": [0.5]},
                    {"samples": [[0.5] * 15]},
                    {"samples": [[None] * 16]},
                ),
                *(
                    {"samples": [["0.5"] * 16]},
                    {"samples": [[0.5] * 16] * 1001},
                    {"ascending": -1},
                    {"ascending": 0.5},
                ),
            ],
        ),
        "patches": (
            [{}, {"weights": 722, "strengths": [0.5, 1]}, {"content": "0f" * 32}],
            [
                *(None, 722, {"weights": "722"}, {"strengths": ["1"]}, {"strengths": 1}),
                *({"content": "0f" * 31}, {"content": "0F" * 32}, {"content": 3}, {"content": None}),
            ],
        ),
    },
    "REPORT": {
        "fitted_latents": COUNTS,
        "held_out_latents": COUNTS,
        "checked": ([True, False], ["yes", 1, None]),
        "teacher_error": MAYBE_NUMBERS,
        "lambda_standard_error": ([[], [None, 0.1]], [0.1, None, ["x"], [-0.1], {}]),
        "undetermined": ([[], [1, 2]], [[1.5], ["1"], {"a": 1}, 1]),
        "shrunk_to": ([0, 0.25], [None, "x", []]),
        "after_steps": (
            [{}, {"stock": [0.1, None], "dode": []}],
            [None, [], {"stock": 0.1}, {"dode": ["x"]}, {"dode": [[]]}],
        ),
        "refined": (
            [{}, {"kept": "Jacobian 1", "stages": [{"stage": "x"}], "interrupted": True}],
            [
                None,
                3,
                [],
                {"kept": None},
                {"kept": 5},
                {"interrupted": "yes"},
                {"stages": 5},
                {"stages": [3]},
                {"stages": [{}]},
                {"stages": [{"stage": 4}]},
                {"stages": [{"stage": "\x1b[2J"}]},
                {"stages": [{"stage": "x", "fitted_error": "y"}]},
                {"stages": [{"stage": "x", "held_out_error": []}]},
                {"stages": [{"stage": "x", "distance": "y"}]},
                {"stages": [{"stage": "x", "evaluations": 10**999}]},
                {"stages": [{"stage": "x"}] * 1001},
            ],
        ),
        "evaluations": ([{}, {"teacher": 3}], [[1], None, {"teacher": "3"}, {"teacher": -1}]),
    },
}


@pytest.mark.parametrize("which", KNOWN)
def test_known_fields_are_what_they_say_or_are_refused_by_name(which):
    checks = getattr(gate, which)
    assert KNOWN[which].keys() == checks.keys()
    for name, (good, bad) in KNOWN[which].items():
        for value in good:
            assert gate.checked({name: value}, checks, "it") == {name: value}
        for value in bad:
            with pytest.raises(DodeError, match=f"^it: '{name}' cannot be .{{0,60}}$"):
                gate.checked({name: value}, checks, "it")


@settings(max_examples=50, deadline=None)
@given(facts=rows.unknown_objects)
def test_what_is_unknown_is_kept_as_it_is(facts):
    for checks in (gate.SETTINGS, gate.MODEL, gate.REPORT):
        assert gate.checked(facts, checks, "it") == json.loads(json.dumps(facts))


def test_facts_are_detached_and_read_only():
    facts = {"cfg": 1, "x": {"y": [1]}}
    copy = gate.checked(facts, gate.SETTINGS, "settings")
    facts["x"]["y"].append(2)
    assert copy == {"cfg": 1, "x": {"y": [1]}}
    with pytest.raises(TypeError):
        copy["cfg"] = 2


@pytest.mark.parametrize("value", [[1], [["a", 1]], "ab", None, 3])
def test_facts_are_an_object(value):
    with pytest.raises(DodeError, match=r"^settings must be an object$"):
        gate.json_object(value, "settings")


@pytest.mark.parametrize(
    "value",
    [{1, 2}, {"a"}, {1: 2}, math.nan, math.inf, object(), b"x", np.zeros(2), 2**4096, -(2**4096)],
    ids=lambda value: type(value).__name__,
)
def test_facts_are_json(value):
    with pytest.raises(DodeError, match="settings cannot be stored as JSON"):
        gate.json_object({"x": value}, "settings")


def test_facts_come_out_as_json_brings_them_back():
    given = {"a": (1, 2.5, None, True, "λ", {"b": [np.float64(0.5)]}), "large": 2**4096 - 1}
    copy = gate.json_object(given, "settings")
    assert copy == {"a": [1, 2.5, None, True, "λ", {"b": [0.5]}], "large": 2**4096 - 1}
    assert type(copy["a"][5]["b"][0]) is float


@pytest.mark.parametrize(
    ("form", "what"), [("lambda", "λ"), ("history", "the weights of one evaluation together")]
)
def test_weights_that_are_too_large_are_called_what_they_are(form, what):
    with pytest.raises(DodeError, match=f"^{what} must be at most 1000; got 2000$"):
        gate.check_weights(np.array([[2000.0]]) if form == "history" else np.array([2000.0]), form)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}")])
def test_facts_can_be_walked_through(opening, closing):
    """However deep the stack is already."""
    for depth, fits in ((31, True), (32, False), (900, False)):
        facts = {"x": json.loads(opening * (depth - 1) + "1" + closing * (depth - 1))}
        if fits:
            assert gate.json_object(facts, "settings") == facts
        else:
            with pytest.raises(
                DodeError, match="settings cannot be stored as JSON: nested more than 32 deep"
            ):
                gate.json_object(facts, "settings")


def test_what_is_nested_too_deeply_for_python_is_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(DodeError, match="settings cannot be stored as JSON"):
        gate.json_object({"x": deep}, "settings")


def test_numbers_are_copied_and_read_only():
    given_ = np.array([1, 2], "f4")
    copy = gate.numbers(given_, "it")
    given_[0] = 9
    assert (copy.tolist(), copy.dtype) == ([1, 2], np.float64)
    with pytest.raises(ValueError, match="read-only"):
        copy[0] = 3


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (["a"], "^it must be numbers"),
        ([1, [2]], "^it must be numbers"),
        ([10**400], "^it must be numbers"),
        ({}, "^it must be numbers"),
        ([math.nan], "^it has NaN or infinite entries"),
        ([-math.inf], "^it has NaN or infinite entries"),
    ],
)
def test_what_holds_no_numbers_is_refused(value, why):
    with pytest.raises(DodeError, match=why):
        gate.numbers(value, "it")


def test_arrays_of_a_later_version_are_numbers_of_any_kind():
    arrays = {"a": np.array([1, np.nan], "f2"), "b": np.zeros((2, 0), bool), "c": np.uint8(3)}
    copies = gate.foreign_arrays(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(copies[name], value, strict=True)
        assert not copies[name].flags.writeable
    with pytest.raises(DodeError, match="the array 'x' must hold numbers, not <U1"):
        gate.foreign_arrays({"x": np.array(["a"])})


@pytest.mark.parametrize("sigmas", [[], [0], [1, 2, 0], [2, 2, 0], [2, 1], [1, 0, -1], [[2, 1, 0]], 3])
def test_what_is_no_schedule_is_refused(sigmas):
    gate.check_schedule(np.array([2.0, 1, 0]), "it")
    with pytest.raises(DodeError, match=r"^it must descend to 0, with no value repeated$"):
        gate.check_schedule(np.array(sigmas, float), "it")


def test_sigmas_and_numbers_are_at_most_float16s_largest():
    gate.check_schedule(np.array([65_504.0, 1, 0]), "it")
    gate.check_size(np.array([65_504.0, -65_504.0]), "it")
    gate.check_size(np.empty(0), "it")
    for check, values in ((gate.check_schedule, [65_504.1, 1, 0]), (gate.check_size, [0, -65_504.1])):
        with pytest.raises(DodeError, match=r"^it must (be|have numbers of) at most 65,504"):
            check(np.array(values), "it")


def test_sigmas_descend_in_single_precision():
    gate.check_schedule(np.array([2.0, 2 - 2**-22, 0]), "it")
    with pytest.raises(DodeError, match="no value repeated in single precision"):
        gate.check_schedule(np.array([2.0, 2 - 2**-30, 0]), "it")


@pytest.mark.parametrize(
    ("weights", "form", "fits"),
    [
        ([1000.0, -1000.0], "lambda", True),
        ([0.0, -1000.1], "lambda", False),
        ([[600.0, 0], [-600, 400]], "history", True),
        ([[600.0, 0], [-600, 400.1]], "history", False),
        ([[[600.0, 0], [0, 0]], [[0, 400], [0, 0]]], "history", True),
        ([[[600.0, 0], [0, 0]], [[0, 400.1], [0, 0]]], "history", False),
        ([[1e308, 0], [1e308, 1e308]], "history", False),
    ],
)
def test_weights_are_at_most_a_thousand(weights, form, fits):
    """λ each; of a history the sum for one evaluation, over all bands."""
    if fits:
        gate.check_weights(np.array(weights), form)
    else:
        with pytest.raises(DodeError, match="must be at most 1000; got"):
            gate.check_weights(np.array(weights), form)


def test_what_is_shown_of_a_value_is_short():
    assert gate.shortened("x" * 58) == f'"{"x" * 58}"'
    assert len(gate.shortened("x" * 59)) == 58
    assert gate.shortened("\u202eλ") == '"\\u202e\\u03bb"'
