"""Levenberg–Marquardt without derivatives: against autograd, on a student that is known to fit, in any batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from dode_nodes import end_to_end
from dode_nodes.denoiser import history_corrections
from dode_nodes.end_to_end import RUNS, Latents, descend
from dode_nodes.errors import DodeError
from dode_nodes.groups import Evaluator, Group, micro_batches
from dode_nodes.solvers import sample_euler
from dode_nodes.student import (
    Student,
    Weight,
    difference_cost,
    first_changed,
    history_parameters,
    sigma_parameters,
)
from tests.oracles import two_peaks
from tests.toys import karras, latents

N = 4
SIGMAS = karras(N, sigma_min=0.3).numpy()
PARAMETERS = [*history_parameters(N), *sigma_parameters(N)]


def student_of(weights, sigmas=SIGMAS):
    return Student(sample_euler, "noise", sigmas, history_corrections(weights))


def ends_of(student, x):
    (batch,) = micro_batches([Group(two_peaks, x)], None)
    return student.run(two_peaks, batch)[0]


def latents_of(x, ends, *, model=two_peaks, size=None, evaluator=None):
    return Latents(micro_batches([Group(model, x)], size), ends, evaluator or Evaluator(), "refining")


def truth():
    """A student to be found, near Adams–Bashforth."""
    weights = np.eye(N) * 1.5 - np.eye(N, k=-1) * 0.5
    return student_of(weights, SIGMAS * np.array([1, 0.9, 1.1, 0.9, 1]))


def test_jacobian_is_the_derivative():
    x, before = latents(3), student_of(np.eye(N))
    small = [replace(parameter, step=1e-6) for parameter in PARAMETERS[:8]]
    subject = latents_of(x, torch.zeros_like(x))
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
    subject = latents_of(x, ends_of(truth(), x))
    start = subject.run(student_of(np.eye(N)))
    errors = [played.error for played in islice(descend(subject, start, PARAMETERS), 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < start.error / 50


def test_a_perfect_start_stays_and_ends():
    x = latents(3)
    subject = latents_of(x, ends_of(truth(), x))
    (after,) = descend(subject, subject.run(truth()), PARAMETERS)
    assert after.error < 1e-12


def test_nothing_to_fit_ends():
    flat = Weight(0, np.array([0.0]))
    subject = latents_of(latents(2), torch.zeros(2, 2, 3, 3))
    start = subject.run(student_of(np.eye(N)))
    assert [played.student for played in descend(subject, start, [flat])] == [start.student]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_micro_batches_make_no_difference(size):
    x = latents(5)
    results = []
    for s in (None, size):
        subject = latents_of(x, ends_of(truth(), x), size=s)
        start = subject.run(student_of(np.eye(N)))
        results.append(list(islice(descend(subject, start, PARAMETERS), 2))[-1].student)
    np.testing.assert_allclose(results[1].corrections, results[0].corrections, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(results[1].sigmas, results[0].sigmas, rtol=1e-7)


def test_cost_of_a_jacobian_and_its_runs():
    x, evaluator = latents(3), Evaluator()
    subject = latents_of(x, ends_of(truth(), x), evaluator=evaluator)
    start = subject.run(student_of(np.eye(N)))
    begun = evaluator.spent()
    next(descend(subject, start, PARAMETERS))
    most = difference_cost(PARAMETERS, N) + RUNS * (N - first_changed(PARAMETERS))
    assert begun == 3 * N
    assert 3 * difference_cost(PARAMETERS, N) < evaluator.spent() - begun <= 3 * most


def test_broydens_update_explains_the_step():
    x = latents(4)
    subject = latents_of(x, ends_of(truth(), x))
    before = subject.run(student_of(np.eye(N)))
    jacobian = subject.jacobian(before, PARAMETERS)
    step = np.random.default_rng(0).normal(0, 0.1, len(PARAMETERS))
    after = subject.run(end_to_end.moved(before.student, PARAMETERS, step))
    jacobian.learn(before, after, step, np.ones(len(step)))
    (part,) = jacobian._parts
    explained = torch.einsum("mpq,p->mq", part.double(), torch.from_numpy(step))
    torch.testing.assert_close(explained, after.residuals[0] - before.residuals[0], rtol=1e-4, atol=1e-5)


def test_a_trial_that_the_network_does_not_stand_is_no_step():
    calls = iter(range(10**6))
    in_the_first_trial = N + difference_cost(PARAMETERS, N) + 1

    def overflows(x, sigma, **extra_args):
        return two_peaks(x, sigma) * (float("nan") if next(calls) == in_the_first_trial else 1)

    x = latents(2)
    subject = latents_of(x, ends_of(truth(), x), model=overflows)
    start = subject.run(student_of(np.eye(N)))
    after = next(descend(subject, start, PARAMETERS))
    assert after.error < start.error
    assert next(calls) > in_the_first_trial + 1


def test_nan_in_a_jacobian_is_an_error():
    answers = iter(range(10**6))

    def breaks(x, sigma, **extra_args):
        return two_peaks(x, sigma) * (float("nan") if next(answers) == 10 else 1)

    x = latents(2)
    subject = latents_of(x, torch.zeros_like(x), model=breaks)
    with pytest.raises(DodeError, match="NaN"):
        next(descend(subject, subject.run(student_of(np.eye(N))), PARAMETERS))


def test_sketch_keeps_least_squares():
    generator = torch.Generator().manual_seed(1)
    jacobian = torch.randn(12, 200_000, generator=generator, dtype=torch.float64)
    residuals = jacobian.T @ torch.linspace(-1, 1, 12, dtype=torch.float64) + torch.randn(
        200_000, generator=generator, dtype=torch.float64
    )
    small, r = end_to_end._sketch(jacobian), end_to_end._sketch(residuals[None])[0]
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

    subject = latents_of(x.to(dtype), ends, model=model)
    start = subject.run(student_of(np.eye(N)))
    after = list(islice(descend(subject, start, PARAMETERS), 4))[-1]
    assert after.error < start.error / 2
