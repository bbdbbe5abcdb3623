"""Rows and tables in words: how they were found, greedy or refined, and how good they are."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings

from dode_nodes import LambdaRow, LambdaTable
from dode_nodes.tables.describe import (
    amount,
    headline,
    headlines,
    held_text,
    row_text,
    summary_text,
    table_json,
    table_text,
)
from dode_nodes.tables.provenance import (
    Distances,
    HeldOutErrors,
    Lora,
    Origin,
    StockSetting,
    TrainedLora,
    Unseen,
)
from dode_nodes.tables.row import MAX_EVALUATIONS
from tests.tables import rows
from tests.tables.rows import row_of

STAGES = [
    {"stage": "row given", "fitted_error": 0.2, "held_out_error": 0.25, "evaluations": 30},
    {"stage": "plain solver", "fitted_error": 0.4, "held_out_error": 0.5, "evaluations": 60},
    {"stage": "Jacobian 1", "fitted_error": 0.05, "held_out_error": None, "evaluations": 600},
]
BEGAN = {"solver": "ipndm", "solver_options": {}, "sigmas": [8.0, 3.0, 1.0, 0.0]}
KINDS = {"row given": "distilled", "plain solver": "plain"}


def row(kept: str = "Jacobian 1", **refined: object) -> LambdaRow:
    """A row of three steps that went through a refinement."""
    report = {
        "fitted_latents": 12,
        "after_steps": {"stock": [None, None, 0.5], "dode": [None, None, 0.06]},
        "evaluations": {"teacher": 100, "refining": 600},
        "refined": {"kept": kept, "stages": STAGES} | refined,
    }
    sigmas = np.array([8.0, 4.0, 2.0, 0.0])
    kind = KINDS.get(kept, "refined")
    return LambdaRow(
        "euler",
        sigmas,
        (1, 1, 1),
        np.tri(3),
        form="history",
        origin=Origin(kind, **(BEGAN if kind == "refined" else {})),
        errors=HeldOutErrors(4, (0.06, 0.05, None), 0.5),
        report=report,
    )


def lines_of(text: str) -> list[str]:
    """Its lines, with single spaces."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_refined_row_says_what_it_began_with_and_came_to() -> None:
    text = row_text(row())
    lines = lines_of(text)
    assert "refined end to end from ipndm: kept the stage closest to the teacher, Jacobian 1" in lines
    assert "stage held-out error fitted error evaluations so far" in lines
    assert "plain solver 0.500 0.400 60" in lines
    assert "Jacobian 1 – 0.0500 600" in lines
    assert "network evaluations spent: teacher 100, refining 600" in lines
    assert "stopped early" not in text


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ("row given", "this is the row before refining"),
        ("plain solver", "this is the plain solver"),
        ("iPNDM-3", "the weights of iPNDM-3"),
    ],
)
def test_what_was_kept_is_said_in_words(kept: str, words: str) -> None:
    assert words in row_text(row(kept))


def test_a_refinement_that_was_ended_says_so() -> None:
    assert "stopped early; this is its best result so far" in row_text(row(interrupted=True))


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


def test_the_summary_has_errors_and_lambda() -> None:
    _, line, unchecked = summary_text([row_of(error=0.1), row_of("heun", evaluations=(1, 1, 1))]).splitlines()
    assert line.split() == ["euler", "noise", "3", "–", "0.100", "–", "+0.1000", "+0.2000"]
    assert unchecked.split()[3:5] == ["–", "–"]


def test_of_a_solver_with_several_evaluations_a_step_both_numbers_are_said() -> None:
    heun = row_of("heun", evaluations=(2, 2, 1))
    assert "heun noise 5 in 3 steps" in " ".join(summary_text([heun, row_of()]).split())
    assert "heun, 3 steps (5 evaluations, noise)" in row_text(heun)
    amounts = [amount(8, 8), amount(1, 1), amount(3, 5), amount(1, 2)]
    assert amounts == ["8 evaluations", "1 evaluation", "3 steps (5 evaluations)", "1 step (2 evaluations)"]


def test_a_solver_that_is_called_refined_is_not_a_refined_row() -> None:
    named = row_of("euler, refined", weights=[0, 0.7, 0.7])
    refined = row_of(origin=Origin("refined", "euler", {}, [8.0, 4.0, 2.0, 0.0]), weights=[0, 0.3, 0.3])
    for table in ([named, refined], [refined, named]):
        _, *lines = summary_text(table).splitlines()
        assert [("+0.7000" in line, "+0.3000" in line) for line in lines] == [
            (each is named, each is refined) for each in table
        ]
    assert "refined from" not in row_text(named)
    assert "refined from euler" in row_text(refined)


def test_errors_of_the_whole_and_of_later_starts() -> None:
    lines = lines_of(row_text(row()))
    assert "error at the end: stock 0.500, D-ODE 0.0600 (−88 %)" in lines
    assert "measured on 4 held-out latents, against the teacher; fitted on 12" in lines
    assert "error if only the last steps are run: 2: 0.0500" in lines
    assert "not checked" not in row_text(row())
    assert "not checked" in row_text(row_of(report={"checked": False}))


def test_the_stock_setting_and_the_loras() -> None:
    stock = StockSetting("dpmpp_2m", "karras", 0.125, 16, discard_penultimate=True)
    text = row_text(
        row_of(
            best_stock=stock,
            loras=[Lora("01234567" * 8, 0.8, "a.safetensors")],
            settings={"x": "\x1b[2J"},
            trained_lora=TrainedLora("89abcdef" * 8, 0.75, 0.0625, 0.125, 12, "own.safetensors"),
        )
    )
    assert "best stock setting: dpmpp_2m, karras without the penultimate σ, 0.125 on 16 latents" in text
    assert "with the LoRA 01234567 a.safetensors at 0.8" in text
    assert "a LoRA of its own, 89abcdef own.safetensors at 0.75: error 0.0625 with it, 0.125 without" in text
    assert "settings: x \N{REPLACEMENT CHARACTER}[2J" in text


def test_what_a_table_holds_is_a_line() -> None:
    one = row_of()
    assert held_text(LambdaTable([one])) == "this table has 3 steps"
    two = row_of(sigmas=(8.0, 4.0, 0.0), settings={"cfg": 4})
    wide = row_of(settings={"cfg": 7, "cfg_range": [3, 7]})
    assert held_text(LambdaTable([two])) == "this table has 2 steps, made at cfg 4"
    assert held_text(LambdaTable([two, wide])) == "this table has 2 and 3 steps, made at cfg 3 to 7"


def test_the_headline_is_of_latents_of_its_own_and_says_where_it_loses() -> None:
    def told(dode: float, stock: float, **facts: object) -> LambdaRow:
        of = [Distances(rms, 0.11, 0.05, 0.2) for rms in (dode, stock)]
        return row_of(unseen=Unseen(8, *of, nearer=0.875), **facts)

    best = {"best_stock": StockSetting("deis", "beta", 0.125, 16)}
    expected = "3 evaluations: 1.9 times nearer to the slow sampler's pictures than the best stock setting (deis, beta)"
    assert headline(told(0.1, 0.19, **best)) == expected
    assert "1.9 times farther from the slow sampler's pictures than plain euler" in str(
        headline(told(0.19, 0.1))
    )
    assert (
        headline(told(0.101, 0.1)) == "3 evaluations: as near to the slow sampler's pictures as plain euler"
    )
    assert headline(row_of(error=0.1)) is None
    assert headline(told(0.0, 0.1)) is None
    text = row_text(told(0.1, 0.19, **best))
    assert expected in text
    assert "fitted or chosen on: D-ODE 0.100 (median 0.110, most 0.0500 to 0.200); stock 0.190 (" in text
    assert "7 of 8 latents end nearer" in text
    better = told(0.05, 0.1, errors=HeldOutErrors(4, (0.1, None, None)))
    other = told(0.2, 0.1, errors=HeldOutErrors(4, (0.2, None, None)))
    assert headlines(LambdaTable([other, better])) == [headline(better)]


def test_hashes_are_shown_by_eight_digits() -> None:
    table = LambdaTable([row(), row_of("heun")])
    lines = lines_of(table_text(table))
    assert lines[0] == f"table {table.sha256[:8]}"
    shown = [line for line in lines if line.startswith("numbers")]
    assert shown == [f"numbers {each.sha256[:8]}" for each in table.rows]
    told = table_json(table)
    assert (told["sha256"], [each["sha256"] for each in told["rows"]]) == (
        table.sha256,
        [each.sha256 for each in table.rows],
    )


def test_a_fingerprint_is_named_not_printed() -> None:
    values = [round(0.011 * i + 0.2, 5) for i in range(48)]
    model = {
        "family": "SD15",
        "fingerprint": {"layout": "89cb2f5b2975123c", "values": values},
        "patches": {"weights": 722, "strengths": [0.55]},
    }
    text = table_text(LambdaTable([row_of(weights=np.zeros(3))], model))
    assert "family SD15" in text
    assert "fingerprint: 89cb2f5b" in text
    assert "with LoRAs or patches on 722 weights" in text
    assert not any(f"{value:g}" in text for value in values)

    sampled = {"fingerprint": {"ascending": 0, "samples": [[0.625, *range(15)], [0.625, *range(15)]]}}
    text = table_text(LambdaTable([row_of(weights=np.zeros(3))], sampled))
    assert "fingerprint: 2 samples of the weights" in text
    assert "0.625" not in text


def test_json_is_all_of_a_table() -> None:
    table = LambdaTable([row()], {"family": "SD15"}, unknown={"x": 1})
    told = json.loads(json.dumps(table_json(table)))
    assert (told["model"], told["x"]) == ({"family": "SD15"}, 1)
    (of_row,) = told["rows"]
    assert (of_row["sigmas"], of_row["weights"]) == ([8, 4, 2, 0], np.tri(3).tolist())
    assert of_row["errors"] == {"latents": 4, "dode": [0.06, 0.05, None], "stock": 0.5}


def test_the_largest_table_text_fits_memory() -> None:
    n = MAX_EVALUATIONS
    largest = LambdaRow("euler", np.linspace(1, 0, n + 1), (1,) * n, np.tri(n) / 7, form="history")
    tracemalloc.start()
    try:
        text = table_text(LambdaTable([largest]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert text.count("+0.1429") == n * (n + 1) // 2
    assert peak < 20e6


def test_many_long_stages_fit_memory() -> None:
    long = row(stages=[{"stage": "x" * 100}] + [{"stage": "x"}] * 999)
    tracemalloc.start()
    try:
        row_text(long)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6


@settings(max_examples=25, deadline=None)
@given(table=rows.tables)
def test_whatever_passes_the_gate_can_be_shown_and_steers_no_terminal(table: LambdaTable) -> None:
    for text in (table_text(table), summary_text(table.rows)):
        assert all(c.isprintable() or c == "\n" for c in text)
    json.dumps(table_json(table), allow_nan=False)
