"""One evaluation after the other equals ``sample_dode``, for every solver, and from every step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dode_nodes import DodeError, IneligibleSampler, LambdaRow, sample_dode
from dode_nodes.sampling.multistep import trace
from dode_nodes.sampling.probe import probe_student
from dode_nodes.sampling.solvers import SOLVERS, sample_euler
from dode_nodes.sampling.stepwise import Course, StepwiseRun
from dode_nodes.tables.free_outputs import FreeOutputs
from dode_nodes.tables.provenance import Origin
from tests.oracles import two_peaks
from tests.toys import Counting, karras, latents, uniform

SCHEDULES = {"karras": karras(6), "flow": uniform(6)}


def stepped(course: Course, x: torch.Tensor, model=two_peaks) -> torch.Tensor:
    """As a host runs it."""
    run, asked = StepwiseRun(course), course.asked_about(x)
    for i, sigma in enumerate(course.asked):
        at = x if i else asked
        noise = (at - model(at, torch.full((len(x),), sigma, dtype=x.dtype))) / sigma
        x, _ = run.after(x, noise)
    return x


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11 * float(expected.abs().max()))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_row_from_each_of_its_steps(solver, prediction, schedule):
    sigmas = SCHEDULES[schedule]
    queries = probe_student(SOLVERS[solver], sigmas)
    lambdas = 0.3 * np.random.default_rng(0).normal(size=len(queries.sigmas))
    row = LambdaRow(solver, sigmas.numpy(), queries.per_step, lambdas, prediction)
    for step in (i for i, count in enumerate(queries.per_step) if count):
        x = latents(2, sigma=float(sigmas[step]))
        expected = sample_dode(two_peaks, x, row.sigmas[step:], row=row, disable=True)
        assert_same(stepped(Course.of(row, step), x), expected)


@pytest.mark.parametrize("paid", [1, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_free_first_step_in_bands_asks_the_network_once_less(schedule, paid):
    sigmas = torch.cat([SCHEDULES[schedule][: paid + 1], SCHEDULES[schedule][-1:]])
    weights = np.tril(0.3 * np.random.default_rng(1).normal(size=(2, paid + 1, paid + 2)), 1)
    began = np.append(np.geomspace(sigmas[0], sigmas[-2], paid), 0)
    row = LambdaRow(
        "euler", sigmas.numpy(), (1,) * (paid + 1), weights, form="history", free=FreeOutputs(first=True, start=True),
        origin=Origin("refined", "euler", {}, began),
    )  # fmt: skip
    x, model = latents(2, sigma=float(sigmas[0])), Counting()
    expected = sample_dode(two_peaks, x, row.sigmas, row=row, disable=True)
    assert_same(stepped(Course.of(row), x, model), expected)
    assert model.sigmas == pytest.approx(sigmas[1:-1].tolist())


def test_euler_without_a_row():
    sigmas = karras(5)
    x = latents(2)
    assert_same(stepped(Course.euler(sigmas.numpy()), x), sample_euler(two_peaks, x, sigmas, disable=True))


def test_what_no_weight_corrects_stays_as_it_is():
    """To the bit: it never goes through the denoised and back."""
    row = LambdaRow("euler", np.array([2.0, 1.0, 0.0]), (1, 1), np.eye(2), form="history")
    x, noise = torch.full((1, 1), 0.1), torch.full((1, 1), 0.7)
    following, _ = StepwiseRun(Course.of(row)).after(x, noise)
    assert torch.equal(following, x + (-1.0) * noise)


def test_a_state_that_was_changed_in_between_is_gone_on_from():
    sigmas = karras(4)
    run, x = StepwiseRun(Course.euler(sigmas.numpy())), latents(1)
    noise = torch.ones_like(x)
    run.after(x, noise)
    changed, _ = run.after(torch.zeros_like(x), noise)
    assert_same(changed, (sigmas[2] - sigmas[1]) * noise)


def test_what_cannot_be_run_is_refused():
    row = LambdaRow("heun", karras(3).numpy(), (2, 2, 1), np.zeros(5))
    run = StepwiseRun(Course.of(row))
    for _ in range(5):
        run.after(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(DodeError, match="the run has ended after 5 evaluations"):
        run.after(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(IneligibleSampler, match="one evaluation at a time"):
        trace(SOLVERS["heun"], karras(3).numpy(), 4)
    other = LambdaRow("dpm_solver_3", karras(3).numpy(), (3, 0, 0), np.zeros(3))
    with pytest.raises(DodeError, match="cannot start at step 1"):
        Course.of(other, 1)
