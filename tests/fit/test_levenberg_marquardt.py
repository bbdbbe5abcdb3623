"""Levenberg–Marquardt without derivatives: against autograd, on a student that is known to fit, in any batches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dode_nodes import DodeError, Latents, Progress, Targets, Teacher
from dode_nodes.fit.evaluator import Evaluator
from dode_nodes.fit.levenberg_marquardt import RUNS, LeastSquaresProblem, count_sketch, levenberg_marquardt
from dode_nodes.fit.student import (
    Student,
    Weight,
    first_changed,
    history_parameters,
    jacobian_cost,
    moved,
    sigma_parameters,
)
from dode_nodes.sampling.denoiser import history_corrections
from dode_nodes.sampling.solvers import sample_euler
from tests.oracles import two_peaks
from tests.toys import Counting, karras, latents, within

N = 4
SIGMAS = karras(N, sigma_min=0.3).numpy()
PARAMETERS = [*history_parameters(N), *sigma_parameters(N)]


def student_of(weights, sigmas=SIGMAS):
    return Student(sample_euler, "noise", sigmas, history_corrections(weights))


def ends_of(student, x):
    (batch,) = Latents.of(two_peaks, x).batches()
    return student.run(two_peaks, batch)[0]


def problem(x, ends, *, model=two_peaks, size=None, evaluator=None):
    """On all latents."""
    subject = Latents.of(model, x, micro_batch=size)
    targets = Targets(subject, Teacher(), {0.0: [ends]}, own_error=None, evaluations=0, approach_cost=0)
    evaluator = evaluator or Evaluator(Progress(10**6))
    return LeastSquaresProblem(targets, range(len(x)), evaluator, "refining")


def descent(subject, start, parameters=PARAMETERS, jacobians=1):
    return list(levenberg_marquardt(subject, start, parameters, jacobians))


def truth():
    """A student to be found, near Adams–Bashforth."""
    weights = np.eye(N) * 1.5 - np.eye(N, k=-1) * 0.5
    return student_of(weights, SIGMAS * np.array([1, 0.9, 1.1, 0.9, 1]))


def test_jacobian_is_the_derivative():
    x, before = latents(3), student_of(np.eye(N))
    small = [replace(parameter, step=1e-6) for parameter in PARAMETERS[:8]]
    subject = problem(x, torch.zeros_like(x))
    played = subject.run(before)
    gram, right = subject.jacobian(played, small).normal_equations(played.residuals)

    def end(amounts):
        state, outputs = x, []
        for k in range(N):
            sigma = torch.full((3,), SIGMAS[k], dtype=torch.float64)
            outputs.append((state - two_peaks(state, sigma)) / SIGMAS[k])
            weights = [float(j == k) + sum(
                amount * parameter.direction[j]
                for parameter, amount in zip(small, amounts, strict=True) if parameter.k == k
            ) for j in range(k + 1)]  # fmt: skip
            step = sum(w * o for w, o in zip(weights, outputs, strict=True))
            state = state + (SIGMAS[k + 1] - SIGMAS[k]) * step
        return state.flatten() / (x[0].numel() ** 0.5)

    zero = torch.zeros(len(small), dtype=torch.float64)
    exact = torch.autograd.functional.jacobian(end, zero)
    np.testing.assert_allclose(gram, (exact.T @ exact).numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(right, (exact.T @ end(zero)).numpy(), rtol=1e-4, atol=1e-5)


def test_finds_a_student_that_fits():
    x = latents(6)
    subject = problem(x, ends_of(truth(), x))
    start = subject.run(student_of(np.eye(N)))
    errors = [played.error for played in descent(subject, start, jacobians=12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < start.error / 50


def test_a_perfect_start_stays_and_ends():
    x = latents(3)
    subject = problem(x, ends_of(truth(), x))
    (after,) = descent(subject, subject.run(truth()), jacobians=9)
    assert after.error < 1e-12


def test_nothing_to_fit_ends():
    flat = Weight(0, np.array([0.0]))
    subject = problem(latents(2), torch.zeros(2, 2, 3, 3))
    start = subject.run(student_of(np.eye(N)))
    assert [played.student for played in descent(subject, start, [flat], jacobians=9)] == [start.student]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_micro_batches_make_no_difference(size):
    x = latents(5)
    results = []
    for s in (None, size):
        subject = problem(x, ends_of(truth(), x), size=s)
        start = subject.run(student_of(np.eye(N)))
        results.append(descent(subject, start, jacobians=2)[-1].student)
    np.testing.assert_allclose(results[1].corrections, results[0].corrections, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(results[1].sigmas, results[0].sigmas, rtol=1e-7)


def test_cost_of_a_jacobian_and_its_runs():
    x, evaluator = latents(3), Evaluator(Progress(10**6))
    subject = problem(x, ends_of(truth(), x), evaluator=evaluator)
    start = subject.run(student_of(np.eye(N)))
    begun = evaluator.spent()
    descent(subject, start)
    most = jacobian_cost(PARAMETERS, student_of(np.eye(N))) + RUNS * (N - first_changed(PARAMETERS))
    assert begun == 3 * N
    assert 3 * jacobian_cost(PARAMETERS, student_of(np.eye(N))) < evaluator.spent() - begun <= 3 * most


def test_broydens_update_explains_the_step():
    x = latents(4)
    subject = problem(x, ends_of(truth(), x))
    before = subject.run(student_of(np.eye(N)))
    jacobian = subject.jacobian(before, PARAMETERS)
    step = np.random.default_rng(0).normal(0, 0.1, len(PARAMETERS))
    after = subject.run(moved(before.student, PARAMETERS, step))
    jacobian.broyden_update(before, after, step, np.ones(len(step)))
    (part,) = jacobian._parts
    explained = torch.einsum("mpq,p->mq", part.double(), torch.from_numpy(step))
    torch.testing.assert_close(explained, after.residuals[0] - before.residuals[0], rtol=1e-4, atol=1e-5)


def test_a_trial_that_the_network_does_not_stand_is_no_step():
    calls = iter(range(10**6))
    in_the_first_trial = N + jacobian_cost(PARAMETERS, student_of(np.eye(N))) + 1

    def overflows(x, sigma, **extra_args):
        return two_peaks(x, sigma) * (float("nan") if next(calls) == in_the_first_trial else 1)

    x = latents(2)
    subject = problem(x, ends_of(truth(), x), model=overflows)
    start = subject.run(student_of(np.eye(N)))
    (after,) = descent(subject, start)
    assert after.error < start.error
    assert next(calls) > in_the_first_trial + 1


def test_nan_in_a_jacobian_is_an_error():
    answers = iter(range(10**6))

    def breaks(x, sigma, **extra_args):
        return two_peaks(x, sigma) * (float("nan") if next(answers) == 10 else 1)

    x = latents(2)
    subject = problem(x, torch.zeros_like(x), model=breaks)
    start = subject.run(student_of(np.eye(N)))
    with pytest.raises(DodeError, match="NaN"):
        descent(subject, start)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6), st.floats(-6, 39))
def test_it_ends_wherever_it_begins(weights, exponent):
    """With no more evaluations than are planned, no larger an error, and no network that is asked for ever."""
    triangle = np.eye(N)
    triangle[np.tril_indices(N, k=-1)] = np.array(weights) * 10**exponent
    x, model = latents(2).float(), Counting()
    subject = problem(x, torch.zeros_like(x), model=model)
    start = subject.trial(student_of(triangle))
    if math.isinf(start.error):
        return
    before = model.evaluations
    try:
        with within(20):
            played = descent(subject, start, jacobians=3)
    except DodeError:  # in the Jacobian
        played = []
    most = jacobian_cost(PARAMETERS, student_of(np.eye(N))) + RUNS * (N - first_changed(PARAMETERS))
    assert model.evaluations - before <= 2 * 3 * most
    assert all(each.objective(start.outlying) <= start.objective(start.outlying) for each in played)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, 1e38])
def test_a_jacobian_that_is_not_finite_gives_no_step(bad):
    """Nor is damping raised for ever in search of one."""
    x = latents(2)
    subject = problem(x, torch.zeros_like(x))
    start = subject.run(student_of(np.eye(N)))
    broken = replace(start, residuals=[torch.full_like(start.residuals[0], bad)])
    with within(20):
        (after,) = descent(subject, broken)
    assert after.error <= start.error


def test_sketch_keeps_least_squares():
    generator = torch.Generator().manual_seed(1)
    jacobian = torch.randn(12, 200_000, generator=generator, dtype=torch.float64)
    residuals = jacobian.T @ torch.linspace(-1, 1, 12, dtype=torch.float64) + torch.randn(
        200_000, generator=generator, dtype=torch.float64
    )
    small, r = count_sketch(jacobian), count_sketch(residuals[None])[0]
    assert small.shape == (12, 4096)
    found = torch.linalg.lstsq(small.T, r[:, None]).solution[:, 0]
    torch.testing.assert_close(found, torch.linspace(-1, 1, 12, dtype=torch.float64), rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_models_are_fitted(dtype):
    x = latents(8, sigma=14.6)
    ends = ends_of(truth(), x)

    def model(x, sigma, **extra_args):
        assert x.dtype == sigma.dtype == dtype
        return two_peaks(x.float(), sigma.float()).to(dtype)

    subject = problem(x.to(dtype), ends, model=model)
    start = subject.run(student_of(np.eye(N)))
    after = descent(subject, start, jacobians=4)[-1]
    assert after.error < start.error / 2
