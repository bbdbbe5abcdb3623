"""A model that follows another one: the teacher runs on that, and all else is measured against it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dode_nodes import (
    DodeError,
    Group,
    LambdaRow,
    LambdaTable,
    Latents,
    Pipeline,
    Recipe,
    Teacher,
    run_teacher,
)
from dode_nodes.fit.evaluator import Evaluator
from dode_nodes.fit.held_out import distances_of
from dode_nodes.fit.progress import Progress
from dode_nodes.sampling.solvers import resolve
from dode_nodes.tables import plots
from dode_nodes.tables.describe import headlines, row_text, rows_told
from tests.oracles import two_peaks
from tests.toys import Counting, karras, latents

SIGMAS = karras(3)
TEACHER = Teacher(scale=4)


def slower(x, sigma):
    """Another model, which ends near two_peaks."""
    return two_peaks(x, sigma) + 0.05 * sigma.reshape(-1, 1, 1, 1) / (1 + sigma.reshape(-1, 1, 1, 1))


def taught(student, teacher, x, order=None, **settings):
    return Latents(
        [Group(student, x, taught_by=Group(teacher, x if order is None else x[order]))], **settings
    )


def test_the_teacher_runs_on_its_own_model_and_the_student_on_its():
    student, teacher = Counting(two_peaks), Counting(slower)
    x = latents(8)
    targets = run_teacher(taught(student, teacher, x, micro_batch=3), SIGMAS, TEACHER)
    alone = run_teacher(Latents.of(slower, x), SIGMAS, TEACHER)
    assert student.evaluations == 0
    assert teacher.evaluations == targets.evaluations == alone.evaluations
    assert list(targets.states) == list(alone.states)
    for stop, states in targets.states.items():
        torch.testing.assert_close(states[0], alone.states[stop][0], rtol=1e-12, atol=1e-12)
    assert targets.own_error == pytest.approx(alone.own_error)


def test_a_row_is_measured_from_the_teachers_states_also_where_it_did_not_stop():
    student, teacher = Counting(two_peaks), Counting(slower)
    x = latents(8)
    targets = run_teacher(taught(student, teacher, x), SIGMAS, TEACHER)
    sigmas = SIGMAS.clone()
    sigmas[1] *= 0.8
    row, euler = LambdaRow("euler", sigmas.numpy(), (1, 1, 1), np.zeros(3)), resolve("euler")
    student.batches.clear(), teacher.batches.clear()
    batches = targets.latents.batches()
    found = distances_of(row, euler, targets, batches, Evaluator(Progress(10**6)), "test", 1)

    above, approach = targets.approach(float(sigmas[1]))
    assert teacher.evaluations == 8 * (len(approach.sigmas) - 1)
    assert student.evaluations == 8 * 2
    state = approach.solver(
        slower, targets.at(above)[0].clone(), approach.sigmas, extra_args={}, disable=True
    )
    end = euler(two_peaks, state, sigmas[1:], extra_args={}, disable=True)
    expected = (end - targets.ends[0]).flatten(1).square().mean(1).sqrt()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def fitted(order=None, student=two_peaks, **recipe):
    """Rows, and figures from latents of their own."""
    first, unseen = latents(16), latents(8, seed=7)
    orders = [None, None] if order is None else [torch.arange(n).roll(order) for n in (16, 8)]
    parts = (taught(student, slower, x, each) for x, each in zip((first, unseen), orders, strict=True))
    fit, figures = parts
    return Pipeline(fit, [SIGMAS], Recipe(teacher=TEACHER, predictions=["noise"], **recipe), figures).run()


def test_what_is_fitted_comes_nearer_to_the_other_model_and_the_headline_says_so():
    (row,) = fitted()
    x = latents(8, seed=7)
    ends = run_teacher(Latents.of(slower, x), SIGMAS, TEACHER).ends[0]
    apart = torch.cdist(ends.flatten(1), ends.flatten(1)).square() / ends[0].numel()
    assert row.unseen.to_others == pytest.approx(float((apart.sum() / 56).sqrt()), rel=0.15)
    assert row.unseen.corresponds
    assert row.unseen.dode.rms < row.unseen.stock.rms
    (line,) = headlines(LambdaTable([row]))
    assert "times nearer to the slow sampler's pictures" in line
    assert LambdaTable.from_json(LambdaTable([row]).to_json()).rows[0].unseen == row.unseen


def test_where_the_ends_do_not_correspond_the_errors_say_so_and_nothing_is_claimed():
    rows = fitted(order=1, refine_budget=10.0)
    table = LambdaTable(rows)
    for row in rows:
        assert not row.unseen.corresponds
        assert row.unseen.dode.rms > 0.8 * row.unseen.to_others
        assert row.unseen.stock_needs is None
        text = row_text(row)
        assert "other pictures than its teacher" in text
        assert f"from the teacher's pictures of other noises {row.unseen.to_others:#.3g}" in text
        assert not any(claim in text for claim in ("times nearer", "times farther", " %)"))
    assert len(rows_told(table)) == len(headlines(table)) == 1
    drawn = plots.report_figure(table)
    assert not any("How far" in ax.get_title() for ax in drawn.axes)


def test_nothing_is_said_of_other_noises_where_the_model_is_its_own_teacher():
    fit, figures = (Latents.of(two_peaks, x) for x in (latents(8), latents(8, seed=7)))
    (row,) = Pipeline(fit, [SIGMAS], Recipe(teacher=TEACHER, predictions=["noise"]), figures).run()
    assert row.unseen.to_others is None
    assert "other noises" not in row_text(row)


def test_the_teachers_latents_have_the_students_shape():
    with pytest.raises(DodeError, match="shape"):
        Latents([Group(two_peaks, latents(4), taught_by=Group(slower, latents(3)))])
