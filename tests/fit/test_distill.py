"""Distillation end to end: λ that can be computed by hand, that helps on unseen latents, that costs what it says."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dode_nodes import DodeError, Group, LambdaTable, Latents, Teacher, distill, run_teacher, sample_dode
from dode_nodes.fit.latents import root_mean_square
from dode_nodes.sampling.solvers import SOLVERS, sample_euler, sample_heun
from tests.oracles import Gaussian, two_peaks
from tests.toys import (
    Counting,
    Interrupted,
    Telling,
    distilled,
    exponential,
    in_shapes,
    karras,
    latents,
    uniform,
    writes_into_what_it_is_given,
)

SIGMAS = karras(5)


def weights(of, sigmas=SIGMAS, scale=10, **kwargs):
    return distilled(of, sigmas, teacher=Teacher(scale=scale), **kwargs).weights


def assert_near(errors, others):
    """None is like None."""
    np.testing.assert_allclose(np.array(errors, dtype=float), np.array(others, dtype=float), rtol=1e-9)


@cache
def as_a_whole(count, scale, solver="euler"):
    """The row of so many latents, evaluated at once."""
    return distilled(on(latents(count)), SIGMAS, solver=solver, teacher=Teacher(scale=scale))


def on(x, model=two_peaks, **kwargs):
    return Latents.of(model, x, **kwargs)


# --- By hand ------------------------------------------------------------------------------------------

MEAN, STD = 0.3, 0.5
GAUSSIAN = Gaussian(flow=False, mean=MEAN, std=STD)


def e(sigma):
    """On x0 ~ N(mean, std²) the noise is this times x − mean: everything is a number times the start's."""
    return sigma / (STD**2 + sigma**2)


def euler_factor(*grid):
    return math.prod(1 + e(high) * (low - high) for high, low in pairwise(grid))


def test_two_step_euler_by_hand():
    s0, s1 = 10.0, 1.0
    sigmas = torch.tensor([s0, s1, 0.0], dtype=torch.float64)
    teacher = euler_factor(s0, math.sqrt(s0 * s1), s1, s1 / 2, 0.0)
    x1 = euler_factor(s0, s1)
    o0, o1 = e(s0), e(s1) * x1
    by_hand = {
        "noise": (teacher - (x1 - s1 * o1)) / (-s1 * (o1 - o0)),
        "data": (teacher - (x1 - s1 * o1)) / ((x1 - s1 * o1) - (1 - s0 * o0)),
    }
    subject = on(latents(5, sigma=s0), GAUSSIAN)
    for prediction, expected in by_hand.items():
        row = distilled(subject, sigmas, prediction=prediction, teacher=Teacher("euler", 2))
        np.testing.assert_allclose(row.weights, [0, expected], rtol=1e-10)
        assert row.error_from() < 1e-12


def test_two_step_heun_by_hand():
    """The inner stage's λ aims at the teacher at the step's end, the next one at its end."""
    s0, s1 = 10.0, 1.0
    sigmas = torch.tensor([s0, s1, 0.0], dtype=torch.float64)
    half = euler_factor(s0, math.sqrt(s0 * s1), s1)
    end = euler_factor(s0, math.sqrt(s0 * s1), s1, s1 / 2, 0.0)
    o0 = e(s0)
    o1 = e(s1) * (1 + (s1 - s0) * o0)
    lambda_1 = (half - (1 + (s1 - s0) * (o0 + o1) / 2)) / ((s1 - s0) * (o1 - o0) / 2)
    o2 = e(s1) * half
    lambda_2 = (end - (half - s1 * o2)) / (-s1 * (o2 - o1))
    row = distilled(on(latents(5, sigma=s0), GAUSSIAN), sigmas, solver="heun", teacher=Teacher("euler", 2))
    np.testing.assert_allclose(row.weights, [0, lambda_1, lambda_2], rtol=1e-10)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
def test_student_that_is_its_own_teacher_needs_no_lambda(solver):
    row = distilled(on(latents(5)), SIGMAS, solver=solver, teacher=Teacher(solver, 1))
    np.testing.assert_allclose(row.weights, 0, atol=1e-12)


# --- It helps -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unseen():
    """Latents that nothing was fitted on, and their converged solution."""
    x = latents(32, seed=50)
    return x, SOLVERS["dpmpp_3m"](two_peaks, x, exponential_to_zero(400), disable=True)


def exponential_to_zero(steps):
    sigmas = torch.logspace(math.log10(14.6), -3, steps, dtype=torch.float64)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_distilled_solver_beats_stock_on_unseen_latents(unseen, solver, prediction):
    x, converged = unseen
    row = distilled(on(latents(24)), SIGMAS, solver=solver, prediction=prediction)
    stock = root_mean_square(SOLVERS[solver](two_peaks, x, SIGMAS, disable=True) - converged)
    ours = root_mean_square(sample_dode(two_peaks, x, SIGMAS, disable=True, row=row) - converged)
    assert ours < 0.9 * stock
    assert ours == pytest.approx(row.error_from(), rel=0.5)


@pytest.mark.parametrize(("flow", "schedule"), [(False, karras(6)), (True, uniform(6))], ids=["VE", "flow"])
def test_one_lambda_for_all_latents_makes_a_linear_model_exact(flow, schedule):
    """Every state is on the teacher's trajectory; what is left is the teacher's own error."""
    model, x = Gaussian(flow=flow), latents(8, sigma=float(schedule[0]), seed=4)
    row = distilled(on(x, model), schedule)
    fresh = latents(8, sigma=float(schedule[0]), seed=5)
    end = sample_dode(model, fresh, schedule, disable=True, row=row)
    assert row.error_from() < 1e-10
    assert (
        root_mean_square(end - model.solve(fresh, schedule[0], schedule[-1]))
        < 2 * row.report["teacher_error"]
    )


# --- The same λ, however the latents are laid out ------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm_solver_3"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_micro_batches_do_not_matter(solver, size):
    x = latents(7)
    expected = as_a_whole(7, 2, solver)
    model = Counting()
    row = distilled(on(x, model, micro_batch=size), SIGMAS, solver=solver, teacher=Teacher(scale=2))
    np.testing.assert_allclose(row.weights, expected.weights, rtol=1e-9, atol=1e-12)
    assert_near(row.errors.dode, expected.errors.dode)
    assert max(model.batches) == min(size, 7)


@pytest.mark.parametrize("sizes", [(3, 4), (1, 1, 5), (1,) * 7])
def test_groups_do_not_matter(sizes):
    x = latents(7)  # one latent is held out, the last, of one group and of many
    groups = [Group(two_peaks, part) for part in x.split(sizes)]
    expected = as_a_whole(7, 2).weights
    for size in (None, 2):
        np.testing.assert_allclose(weights(Latents(groups, size), scale=2), expected, rtol=1e-9)


@pytest.mark.parametrize("shapes", [("8x8", "4x6"), ("video", "8x8")], ids=" beside ".join)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_groups_of_different_shapes_weigh_the_same(solver, shapes):
    x = latents(8, 2, 4, 2)  # its last ones are held out, too, when they are two groups of four
    expected = distilled(on(x[[0, 1, 2, 4, 5, 6, 3, 7]]), SIGMAS, solver=solver, teacher=Teacher(scale=2))
    for size in (None, 3):
        several = in_shapes(x, *shapes, micro_batch=size)
        assert several.held_out == [3, 7]
        row = distilled(several, SIGMAS, solver=solver, teacher=Teacher(scale=2))
        np.testing.assert_allclose(row.weights, expected.weights, rtol=1e-9)
        assert_near(row.errors.dode, expected.errors.dode)
        assert row.report["teacher_error"] == pytest.approx(expected.report["teacher_error"], rel=1e-9)


def shifted(x, sigma, shift):
    """A conditioning of each latent's own."""
    shift = shift.reshape(-1, *[1] * (x.ndim - 1)).to(x)
    return two_peaks(x - shift, sigma) + shift


SHIFTS = torch.tensor([0.0, 0.5, -1.0, 2.0, 0.3, 1.0, -0.2])


@pytest.mark.parametrize("size", [None, 1, 3])
def test_every_latent_keeps_its_own_conditioning(size):
    """As one group with a function of the indices, and as a group each."""
    x = latents(7)

    def by_index(indices):
        return {"shift": SHIFTS[indices]}

    expected = weights(on(x, shifted, extra_args=lambda indices: by_index(indices)), scale=2)
    groups = [Group(shifted, x[i : i + 1], {"shift": SHIFTS[i : i + 1]}) for i in range(7)]
    np.testing.assert_allclose(weights(Latents(groups), scale=2), expected, rtol=1e-9)
    whole = weights(on(x, shifted, extra_args=by_index, micro_batch=size), scale=2)
    np.testing.assert_allclose(whole, expected, rtol=1e-9)
    halves = [
        Group(shifted, x[:3], by_index),
        Group(shifted, x[3:], lambda indices: {"shift": SHIFTS[3:][indices]}),
    ]
    np.testing.assert_allclose(weights(Latents(halves, size), scale=2), expected, rtol=1e-9)
    assert not np.allclose(weights(on(x), scale=2), expected)


def euler_lambdas(x):
    return weights(on(x), scale=2)


@cache
def expected_lambdas(*shape):
    return euler_lambdas(latents(*shape))


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(6)))
def test_order_of_the_fitted_latents_does_not_matter(order):
    x = latents(7)
    np.testing.assert_allclose(euler_lambdas(x[[*order, 6]]), expected_lambdas(7), rtol=1e-9)


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(9)), mirrored=st.booleans())
def test_lambda_has_the_symmetries_of_the_model(order, mirrored):
    """two_peaks acts on every element alike and is odd."""
    x = latents(5, 1, 3, 3)
    other = x.flatten(1)[:, order].reshape(x.shape) * (-1 if mirrored else 1)
    np.testing.assert_allclose(euler_lambdas(other), expected_lambdas(5, 1, 3, 3), rtol=1e-9)


@settings(max_examples=6, deadline=None)
@given(scale=st.floats(0.01, 100))
def test_lambda_is_dimensionless(scale):
    """Of a model in other units: data, noise and σ times a number."""

    def scaled(x, sigma):
        return scale * two_peaks(x / scale, sigma / scale)

    teacher = Teacher(scale=2, flow=False)
    row = distilled(on(scale * latents(5), scaled), scale * SIGMAS, teacher=teacher)
    np.testing.assert_allclose(row.weights, expected_lambdas(5), rtol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (2, 9), (2, 3, 3), (2, 2, 3, 3)])
def test_any_rank(shape):
    x = latents(5, *shape)
    np.testing.assert_allclose(weights(on(x), scale=2), weights(on(x.flatten(1)), scale=2), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("solver", ["euler", "heun", "ipndm"])
def test_half_precision(solver, dtype):
    """λ near the exact ones; it still helps. Heun's at the start of a step hang on small differences."""

    def model(x, sigma):
        assert x.dtype == dtype
        return two_peaks(x, sigma.to(dtype))

    exact = as_a_whole(16, 4, solver).weights
    row = distilled(on(latents(16).to(dtype), model), SIGMAS.float(), solver=solver, teacher=Teacher(scale=4))
    assert row.settings["dtype"] == str(dtype).removeprefix("torch.")
    tolerance = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
    if solver != "heun":
        np.testing.assert_allclose(row.weights, exact, atol=tolerance)
    assert row.error_from() < row.errors.stock
    assert row.weights.dtype == row.sigmas.dtype == np.float64


def test_schedule_in_half_precision():
    row = distilled(on(latents(8).float()), SIGMAS.half(), teacher=Teacher(scale=4))
    np.testing.assert_array_equal(row.sigmas, SIGMAS.half().double())


# --- What a run gets and gives -------------------------------------------------------------------------


def test_row_of_a_run():
    x = latents(8)
    row = distilled(on(x), SIGMAS, solver="ipndm", solver_options={"max_order": 3}, prediction="data",
                    teacher=Teacher(scale=4), settings={"cfg": 7.5, "seed": 3})  # fmt: skip
    assert (row.solver, row.prediction, row.form) == ("ipndm", "data", "lambda")
    assert row.solver_options == {"max_order": 3}
    assert (row.origin.kind, row.origin.sigmas) == ("distilled", None)
    assert row.evaluations == (1,) * 5
    np.testing.assert_array_equal(row.sigmas, SIGMAS)
    assert row.settings == {
        "latent_shape": [2, 3, 3], "dtype": "float64", "latents": 8, "groups": 1,
        "teacher": "dpmpp_2m", "scale": 4, "cfg": 7.5, "seed": 3,
    }  # fmt: skip
    report = row.report
    assert (report["fitted_latents"], report["held_out_latents"], report["checked"]) == (6, 2, True)
    assert report["teacher_error"] == run_teacher(on(x), SIGMAS, Teacher(scale=4)).own_error
    assert report["undetermined"] == []
    assert report["lambda_standard_error"][0] is None
    assert all(0 < error < 1 for error in report["lambda_standard_error"][1:])


def test_single_latent_is_fitted_and_marked_as_not_checked():
    model = Counting()
    row = distilled(on(latents(1), model), SIGMAS)
    assert row.report["checked"] is False
    assert row.report["held_out_latents"] == 0
    assert row.report["lambda_standard_error"] == [None] * 5
    assert "after_steps" not in row.report
    assert row.errors is None
    assert sum(row.report["evaluations"].values()) == model.evaluations
    assert row.weights.any()


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm_solver_3"])
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_evaluations_are_what_the_report_says(solver, batch):
    model, told = Counting(), Telling()
    targets = run_teacher(on(latents(batch), model, micro_batch=2), SIGMAS, Teacher(scale=4), solvers=solver)
    taught = model.evaluations
    model.batches.clear()
    row = distill(targets, SIGMAS, solver=solver, progress=told)
    spent = row.report["evaluations"]
    held = max(1, batch // 4) if batch > 1 else 0
    later = 2 * {"euler": 4 + 3 + 2 + 1, "heun": 7 + 5 + 3 + 1, "dpm_solver_3": 2 + 1}[solver]
    assert sum(spent.values()) == taught + model.evaluations
    assert spent["teacher"] == taught
    assert spent["student"] == row.nfe * batch
    assert spent.get("stock", 0) == row.nfe * held
    assert spent.get("later starts", 0) == later * held
    assert [note.done for note in told] == [*np.cumsum(model.batches), model.evaluations]
    told.check(planned=row.nfe * (batch + 4 * held) + later * held, spent=model.evaluations)


def test_students_of_one_teacher():
    """Two schedules and two solvers from one run are nearly what runs of their own give."""
    x, schedules = latents(8), [karras(4), karras(6)]
    targets = run_teacher(on(x), schedules, Teacher(scale=10), solvers=["euler", "dpm_2"])
    for schedule in schedules:
        for solver in ("euler", "dpm_2"):
            shared = distill(targets, schedule, solver=solver)
            alone = weights(on(x), schedule, solver=solver)
            np.testing.assert_allclose(shared.weights, alone, rtol=0.1, atol=0.02)
    same = run_teacher(on(x), karras(4), Teacher(scale=10), solvers=["euler", "heun"])
    np.testing.assert_array_equal(distill(same, karras(4)).weights, weights(on(x), karras(4)))


def test_callable_solver():
    def mine(model, x, sigmas, **kwargs):
        return sample_heun(model, x, sigmas, **kwargs)

    row = distilled(on(latents(4)), SIGMAS, solver=mine)
    named = distilled(on(latents(4)), SIGMAS, solver="heun")
    assert row.solver == "<mine>"
    assert row.is_callable
    np.testing.assert_array_equal(row.weights, named.weights)
    x = latents(2, seed=3)
    ours = sample_dode(two_peaks, x, SIGMAS, disable=True, row=row, solver=mine)
    assert torch.equal(ours, sample_dode(two_peaks, x, SIGMAS, disable=True, row=named))


def test_options_reach_the_solver_everywhere():
    def damped(model, x, sigmas, *, by, **kwargs):
        return sample_euler(lambda x, sigma, **args: by * model(x, sigma, **args), x, sigmas, **kwargs)

    same, other = (
        distilled(on(latents(4)), SIGMAS, solver=damped, solver_options={"by": by}, teacher=Teacher(scale=2))
        for by in (1.0, 0.9)
    )
    plain = distilled(on(latents(4)), SIGMAS, teacher=Teacher(scale=2))
    np.testing.assert_allclose(same.weights, plain.weights, rtol=1e-9)
    assert_near(same.errors.dode, plain.errors.dode)
    assert not np.allclose(other.weights, plain.weights)


def test_sampler_that_writes_into_what_it_is_given():
    """Of x, sigmas and extra_args every run gets its own."""
    extra_args = {"seed": 1, "model_options": {"a": [1]}}
    sigmas, x = SIGMAS.clone(), latents(4)

    def model(x, sigma, seed, model_options):
        return two_peaks(x, sigma)

    row = distilled(on(x, model, extra_args=extra_args), sigmas, solver=writes_into_what_it_is_given)
    assert torch.equal(sigmas, SIGMAS)
    assert torch.equal(x, latents(4))
    assert extra_args == {"seed": 1, "model_options": {"a": [1]}}
    plain = distilled(on(x), SIGMAS)
    np.testing.assert_allclose(row.weights, plain.weights, rtol=1e-9)
    assert_near(row.errors.dode, plain.errors.dode)


def test_sampler_finds_the_models_attributes_everywhere():
    model, found = Counting(), []

    def asks_behind_the_call(denoiser, x, sigmas, **kwargs):
        found.append(denoiser.inner_model is model.inner_model)
        return sample_euler(denoiser, x, sigmas, **kwargs)

    teacher = Teacher(asks_behind_the_call)
    distilled(on(latents(4), model), SIGMAS, solver=asks_behind_the_call, teacher=teacher)
    assert len(found) > 20
    assert all(found)


def test_nothing_is_tracked_for_backpropagation():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    x = latents(4).requires_grad_()
    assert weights(on(x, lambda x, sigma: weight * two_peaks(x, sigma)), scale=2).any()


def test_row_samples_after_a_round_trip(tmp_path):
    row = distilled(on(latents(4)), SIGMAS)
    loaded = LambdaTable.load(LambdaTable([row]).save(tmp_path / "t.safetensors")).rows[0]
    assert loaded == row
    x = latents(2, seed=9)
    assert torch.equal(
        sample_dode(two_peaks, x, SIGMAS, disable=True, row=loaded),
        sample_dode(two_peaks, x, SIGMAS, disable=True, row=row),
    )


# --- Interruption and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batches",
    [2, 24, 32, 36, 44],
    ids=["teacher", "half as fine teacher", "student", "stock solver", "later starts"],
)
@pytest.mark.parametrize("where", ["model", "progress"])
def test_interruption_passes_unchanged_and_leaves_nothing(where, batches):
    stop, x = Interrupted(), latents(4)

    class Stopping(Counting):
        def __call__(self, *args, **kwargs):
            if where == "model" and len(self.batches) == batches:
                raise stop
            return super().__call__(*args, **kwargs)

    def interrupt(progress):
        if where == "progress" and len(model.batches) == batches:
            raise stop

    model = Stopping()

    def both():
        targets = run_teacher(on(x, model), SIGMAS, Teacher(scale=4), progress=interrupt)
        return distill(targets, SIGMAS, progress=interrupt)

    with pytest.raises(Interrupted) as caught:
        both()
    assert caught.value is stop
    assert len(model.batches) == batches
    batches = -1
    np.testing.assert_array_equal(both().weights, as_a_whole(4, 4).weights)


def fails_from(evaluation):
    """A model that returns NaN from one of its evaluations on."""
    seen = []

    def model(x, sigma):
        seen.append(len(x))
        denoised = two_peaks(x, sigma)
        return denoised * float("nan") if len(seen) > evaluation else denoised

    return model


@pytest.mark.parametrize(("stage", "evaluation"), [("teacher", 3), ("student", 32), ("stock solver", 36)])
def test_nan_of_the_model_is_told(stage, evaluation):
    with pytest.raises(DodeError, match=rf"NaN or infinite values at σ = .* \({stage}\)"):
        distilled(on(latents(4), fails_from(evaluation)), SIGMAS, teacher=Teacher(scale=4))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sigmas": torch.tensor([1.0])}, "at least two entries"),
        ({"sigmas": SIGMAS.flip(0)}, "ascends"),
        ({"sigmas": SIGMAS[[0, 1, 1, 5]]}, "is repeated"),
        ({"sigmas": SIGMAS[:-1]}, "must end at σ = 0"),
        ({"prediction": "epsilon"}, r"prediction must be one of \('noise', 'data'\), not 'epsilon'"),
        ({"solver": "no such"}, "no solver is called 'no such'; there are euler"),
        ({"solver_options": {"max_order": 2}}, "with these options"),
        ({"solver_options": {"noise_sampler": len}}, "solver_options cannot be stored as JSON"),
        ({"settings": {"prompts": {1, 2}}}, "settings cannot be stored as JSON"),
        ({"settings": {"cfg": float("nan")}}, "settings cannot be stored as JSON"),
        ({"settings": {"cfg": -3}}, "settings: 'cfg' cannot be -3"),
        ({"sigmas": karras(300)}, "evaluates the network 300 times; at most 256"),
        ({"sigmas": karras(6)}, r"run the teacher for this schedule and solver: .* no state at σ = "),
        ({"solver": "dpm_2"}, r"run the teacher for this schedule and solver: .* no state at σ = "),
    ],
)
def test_wrong_input_is_refused_before_any_evaluation(changes, why):
    model = Counting()
    targets = run_teacher(on(latents(3), model), SIGMAS, Teacher(scale=2))
    before = model.evaluations
    with pytest.raises(DodeError, match=why):
        distill(**{"targets": targets, "sigmas": SIGMAS} | changes)
    assert model.evaluations == before


def test_exponential_schedule_of_a_merging_solver():
    """Where stages fall on σ of the schedule, steps are still told from stages."""
    row = distilled(on(latents(6, sigma=10.0)), exponential(7), solver="dpm_solver_3")
    assert row.evaluations == (3, 0, 0, 3, 0, 0, 1)
    assert row.error_from() < row.errors.stock
