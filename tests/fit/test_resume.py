"""A fit that is ended at any place and begun again finds the same, to the bit, and does no whole part twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dode_nodes import (
    LambdaTable,
    Latents,
    Pipeline,
    Progress,
    Recipe,
    Refinement,
    Teacher,
    distill,
    run_teacher,
)
from dode_nodes.fit.key import FIT_VERSION
from dode_nodes.sampling.schedules import NoiseSchedule, schedules_of
from dode_nodes.sampling.solvers import sample_euler
from dode_nodes.tables.kept import SUFFIX, Kept
from dode_nodes.tables.notes import Notes
from tests.oracles import two_peaks
from tests.toys import Counting, Interrupted, Telling, latents

NOISE = NoiseSchedule.stable_diffusion()
schedules = schedules_of(NOISE)
BUDGET = 3.0


def pipeline(model, folder: Path | None, solvers=("euler",), budget: float = BUDGET) -> Pipeline:
    recipe = Recipe(
        solvers=solvers,
        predictions=["noise"],
        teacher=Teacher(scale=8),
        refine_budget=budget,
        make_sigmas=schedules,
        or_stock=True,
    )
    kept = None if folder is None else kept_in(folder)
    some, unseen = (Latents.of(model, latents(n, seed=n)) for n in (5, 4))
    return Pipeline(some, [schedules("karras", n, False) for n in (2, 3)], recipe, unseen, kept)


def kept_in(folder: Path) -> Kept:
    return Kept(folder / "work", "ab" * 32, Notes(folder / "notes.jsonl"))


def ended_at(count: int):
    def tell(progress: Progress) -> None:
        if progress.done >= count:
            raise Interrupted

    return tell


@pytest.fixture(scope="module")
def whole():
    """Of a run that nothing ends: its rows, the stages with the count after each evaluation, and the evaluations."""
    counting, told = Counting(), Telling()
    rows = pipeline(counting, None).run(told)
    return rows, told, counting.evaluations


def text_of(rows) -> str:
    """All that a table of the rows has in it, with every number's last digit."""
    return json.dumps(LambdaTable(rows).to_json(), sort_keys=True)


def test_keeping_changes_nothing(whole, tmp_path):
    rows, _, evaluations = whole
    counting = Counting()
    assert text_of(pipeline(counting, tmp_path).run()) == text_of(rows)
    assert counting.evaluations == evaluations


@pytest.mark.parametrize(
    ("stage", "which", "taught"),
    [("teacher", 1, False), ("student", -1, True), ("refining", -1, True), ("unseen latents", 1, True)],
)
def test_a_run_that_was_ended_goes_on_to_the_same_rows(stage, which, taught, whole, tmp_path):
    rows, told, evaluations = whole
    first, again, notes = Counting(), Counting(), Telling()
    with pytest.raises(Interrupted):
        pipeline(first, tmp_path).run(ended_at([note.done for note in told if note.stage == stage][which]))
    resumed = pipeline(again, tmp_path)
    assert ("goes on" in " ".join(resumed.remarks)) == taught
    assert text_of(resumed.run(notes)) == text_of(rows)
    assert notes[-1].done == notes[-1].total == again.evaluations
    if taught:
        cost = resumed.cost
        lost = max(cost.unseen, *cost.students, *(plan.evaluations for plan in cost.refining))
        assert again.evaluations + first.evaluations <= evaluations + lost  # of the part that it fell in
        assert again.evaluations <= evaluations - resumed.cost.teacher
    else:
        assert again.evaluations == evaluations


def test_jacobians_that_are_done_are_not_made_again(tmp_path):
    sigmas = schedules("karras", 3, False)
    targets = run_teacher(Latents.of(two_peaks, latents(4)), sigmas, Teacher(scale=4))
    row = distill(targets, sigmas)
    told, again = Telling(), Telling()
    whole = Refinement(targets, row).run(told)
    fitting = [note.done for note in told if note.stage == "refining"]
    kept = kept_in(tmp_path).part("refining")
    with pytest.raises(Interrupted):
        Refinement(targets, row, kept=kept).run(ended_at(fitting[-1]))
    assert text_of([Refinement(targets, row, kept=kept).run(again)]) == text_of([whole])
    assert again[-1].done < told[-1].done / 2
    other = distill(targets, sigmas, prediction="data")
    assert text_of([Refinement(targets, other, kept=kept).run()]) == text_of(
        [Refinement(targets, other).run()]
    )


def test_a_finished_run_evaluates_only_the_figures_again(whole, tmp_path):
    rows, _, _ = whole
    pipeline(Counting(), tmp_path).run()
    counting, told = Counting(), Telling()
    assert text_of(pipeline(counting, tmp_path).run(told)) == text_of(rows)
    assert {note.stage for note in told if note.done} == {"unseen latents"}


def test_a_damaged_file_is_made_again(whole, tmp_path):
    rows, _, evaluations = whole
    pipeline(Counting(), tmp_path).run()
    for file in (tmp_path / "work").glob(f"*{SUFFIX}"):
        file.write_bytes(file.read_bytes()[:-1])
    counting = Counting()
    assert text_of(pipeline(counting, tmp_path).run()) == text_of(rows)
    assert counting.evaluations == evaluations


def test_the_version_of_the_fit_stands_for_these_numbers(whole):
    """If this fails, a fit computes something else than it did: raise FIT_VERSION, and put down what it finds now."""
    rows, _, _ = whole
    greedy, refined = rows[1], rows[3]
    assert FIT_VERSION == 5
    assert greedy.weights == pytest.approx([0.0, 0.8808, 1.798], rel=1e-3)
    assert refined.weights[2] == pytest.approx([0.0862, 0.1475, 1.2226], rel=1e-2)
    assert [row.unseen.dode.rms for row in rows] == pytest.approx([0.3388, 0.2612, 0.2296, 0.0621], rel=1e-2)


def test_of_a_solver_that_is_a_function_the_teacher_alone_is_kept(tmp_path):
    def own(*args, **options):
        return sample_euler(*args, **options)

    first = pipeline(Counting(), tmp_path, solvers=[own], budget=0.0).run()
    counting, told = Counting(), Telling()
    assert pipeline(counting, tmp_path, solvers=[own], budget=0.0).run(told) == first
    stages = {note.stage for note in told}
    assert "student" in stages
    assert "teacher" not in stages
