"""Rows in words: how they were found, greedy or refined, whatever a file's report says."""

from __future__ import annotations

import numpy as np
import pytest

from dode_nodes import LambdaRow
from dode_nodes.tables.describe import row_text, summary_text

STAGES = [
    {"stage": "row given", "fitted_error": 0.2, "held_out_error": 0.25, "evaluations": 30},
    {"stage": "plain solver", "fitted_error": 0.4, "held_out_error": 0.5, "evaluations": 60},
    {"stage": "Jacobian 1", "fitted_error": 0.05, "held_out_error": None, "evaluations": 600},
]
BEGAN = {"solver": "ipndm", "solver_options": {}, "sigmas": [8.0, 3.0, 1.0, 0.0]}


def row(kept: str = "Jacobian 1", **refined: object) -> LambdaRow:
    """A refined row of three steps."""
    report = {
        "error": {"stock": [None, None, 0.5], "dode": [None, None, 0.06], "stock_end": 0.5, "dode_end": 0.06},
        "evaluations": {"teacher": 100, "refining": 600},
        "refined": {"kept": kept, "from": BEGAN, "stages": STAGES} | refined,
    }
    sigmas = np.array([8.0, 4.0, 2.0, 0.0])
    return LambdaRow("euler", sigmas, (1, 1, 1), np.tri(3), form="history", report=report)


def test_a_refined_row_says_what_it_began_with_and_came_to() -> None:
    text = row_text(row())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "refined end to end from ipndm: kept what was nearest to the teacher, Jacobian 1" in lines
    assert "stage held-out error fitted error evaluations so far" in lines
    assert "plain solver 0.500 0.400 60" in lines
    assert "Jacobian 1 – 0.0500 600" in lines
    assert "network evaluations spent: teacher 100, refining 600" in lines
    assert "ended early" not in text


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ("row given", "this is the row as it was"),
        ("plain solver", "this is the plain solver"),
        ("iPNDM-3", "the weights of iPNDM-3"),
    ],
)
def test_what_was_kept_is_said_in_words(kept: str, words: str) -> None:
    assert words in row_text(row(kept))


def test_a_refinement_that_was_ended_says_so() -> None:
    assert "ended early; this is the best of it" in row_text(row(interrupted=True))


def test_the_summary_has_no_room_for_a_triangle() -> None:
    head, line = summary_text([row()]).splitlines()
    assert head.split()[0] == "solver"
    assert line.split() == [
        "ipndm,",
        "refined",
        "noise",
        "3",
        "0.500",
        "0.0600",
        "weights",
        "over",
        "the",
        "history",
    ]


@pytest.mark.parametrize(
    "refined",
    [
        {"stages": 5},
        {"stages": [3, None, {}, {"stage": 4}]},
        {"stages": [{"stage": "\x1b[2J", "fitted_error": "x", "held_out_error": [], "evaluations": 10**999}]},
        {"from": [], "interrupted": "yes"},
    ],
)
def test_odd_reports_are_shown_as_far_as_they_go(refined: dict) -> None:
    text = row_text(row(**refined))
    assert "refined end to end" in text
    assert "\x1b" not in text
    summary_text([row(**refined)])
