"""Refinement: it helps on unseen latents, does no harm, costs at most what it says, and loses nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dode_nodes import (
    DodeError,
    Group,
    IneligibleSampler,
    LambdaRow,
    LambdaTable,
    Latents,
    Progress,
    Refinement,
    Teacher,
    distill,
    plan_refinement,
    plan_teacher,
    refine,
    run_teacher,
    sample_dode,
)
from dode_nodes.fit import race
from dode_nodes.fit.latents import root_mean_square
from dode_nodes.fit.scope import FEW_LATENTS, JACOBIANS, UNIT
from dode_nodes.sampling.schedules import NoiseSchedule, schedules_of
from dode_nodes.sampling.solvers import SOLVERS, sample_dpm_2, sample_euler
from dode_nodes.tables.gate import LARGEST_WEIGHT
from dode_nodes.tables.provenance import HeldOutErrors
from tests.oracles import Gaussian, two_peaks
from tests.short_race import shorten_race
from tests.toys import (
    Counting,
    Interrupted,
    Telling,
    in_shapes,
    karras,
    latents,
    uniform,
    within,
    writes_into_what_it_is_given,
)

SIGMAS = karras(4)
SD = NoiseSchedule.stable_diffusion()
schedule_of = schedules_of(SD)


def on(x, model=two_peaks, **kwargs):
    return Latents.of(model, x, **kwargs)


def taught(of, sigmas=SIGMAS, solver="euler", scale=5):
    return run_teacher(of, sigmas, Teacher(scale=scale), solvers=solver)


def begun(of, sigmas=SIGMAS, solver="euler", **kwargs):
    """Targets, and the row that was distilled on them."""
    targets = taught(of, sigmas, solver, **kwargs)
    return targets, distill(targets, sigmas, solver=solver)


@cache
def begun_on_eight():
    """The same of eight latents, for all tests that change nothing of it."""
    return begun(on(latents(8)))


def row_of(solver="euler", sigmas=SIGMAS, weights=None, evaluations=None, **fields):
    """A row of zeros, which is the plain solver, unless weights are given."""
    evaluations = evaluations or (1,) * (len(sigmas) - 1)
    weights = np.zeros(sum(evaluations)) if weights is None else weights
    return LambdaRow(solver, np.asarray(sigmas), evaluations, weights, **fields)


def held_out_error(row, targets, solver=None):
    """RMS distance to the teacher on the latents held out of the fit, of one group."""
    (batch,) = targets.latents.batches(targets.latents.held_out)
    end = sample_dode(batch.group.model, batch.x, row.sigmas, disable=True, row=row, solver=solver)
    return root_mean_square(end - targets.of(batch, 0.0))


def stages(row):
    return {stage["stage"]: stage for stage in row.report["refined"]["stages"]}


# --- What it is for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigmas", [SIGMAS, uniform(5)], ids=["karras", "flow"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "ipndm"])
def test_refined_is_far_nearer_on_unseen_latents(solver, sigmas):
    x, fresh = (latents(count, sigma=float(sigmas[0]), seed=seed) for count, seed in ((16, 0), (32, 1)))
    targets, row = begun(on(x), sigmas, solver)
    refined = refine(targets, row)
    exact = SOLVERS["dpmpp_2m"](two_peaks, fresh, Teacher(scale=60).grid([], [sigmas]), disable=True)
    before, after = (
        root_mean_square(sample_dode(two_peaks, fresh, r.sigmas, disable=True, row=r) - exact)
        for r in (row, refined)
    )
    assert after < 0.7 * before
    assert (refined.solver, refined.form, refined.prediction) == ("euler", "history", "noise")
    assert refined.nfe == row.nfe


def test_what_is_behind_until_the_family_is_widened_is_found(monkeypatch):
    """From these few starts, those with a first step that is free end farther away, until the family is widened."""
    shorten_race(race, monkeypatch)
    x, sigmas = latents(16, 1, 4, 4, sigma=SD.sigma_max, seed=1), schedule_of("karras", 5, False)
    targets, row = begun(on(x), sigmas, scale=10)
    whole = Refinement(targets, row, make_sigmas=schedule_of)
    fits = {}
    for budget in (None, (whole.plan.fitting - 1) / (UNIT * row.nfe * len(x))):
        fit = Refinement(targets, row, make_sigmas=schedule_of, budget=budget)
        fits[fit.plan.kinds] = min(fit.stage_by_stage(), key=lambda stage: stage.distance), fit.best
    (of_one, one), (of_both, both) = fits[1], fits[2]
    assert both.free.first
    assert not one.free.first
    assert of_both.distance < 0.7 * of_one.distance


def test_a_linear_ode_is_solved_by_the_weights_alone():
    """On a Gaussian every state is a line through x_T: some W ends exactly where the teacher does."""
    targets, row = begun(on(latents(12), Gaussian(flow=False)), scale=20)
    refined = refine(targets, row)
    assert refined.error_from() < 1e-3 * refined.errors.stock


@pytest.mark.parametrize(("solver", "sampler"), [("heun", None), ("<dpm_2>", sample_dpm_2)])
def test_several_stages_keep_solver_and_schedule(solver, sampler):
    targets, row = begun(on(latents(12)), solver=sampler or solver)
    refined = refine(targets, row, solver=sampler)
    assert (refined.solver, refined.form, refined.evaluations) == (row.solver, "lambda", row.evaluations)
    assert np.array_equal(refined.sigmas, row.sigmas)
    assert not np.array_equal(refined.weights, row.weights)
    assert stages(refined)["row given"]["held_out_error"] > refined.error_from()


# --- No harm ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10_000),
    solver=st.sampled_from(["euler", "dpmpp_2m", "ipndm", "deis", "heun"]),
    prediction=st.sampled_from(["noise", "data"]),
    scale=st.floats(0, 3),
)
def test_never_worse_than_what_was_given_nor_the_plain_solver(seed, solver, prediction, scale):
    evaluations = (2, 2, 1) if solver == "heun" else (1, 1, 1)
    lambdas = np.random.default_rng(seed).normal(0, scale, sum(evaluations))
    sigmas = karras(3)
    row = row_of(solver, sigmas, lambdas, evaluations, prediction=prediction)
    targets = taught(on(latents(5, seed=seed)), sigmas, solver, scale=4)
    kept = held_out_error(refine(targets, row), targets)
    for other in (row, replace(row, weights=0 * lambdas)):
        assert kept <= held_out_error(other, targets) * (1 + 1e-9)


def ends_of(row, x):
    return sample_dode(two_peaks, x, row.sigmas, disable=True, row=row)


def test_what_the_fit_makes_worse_on_unseen_latents_comes_back_as_it_was():
    x = latents(8)
    targets, row = begun(on(x))
    ends = ends_of(row, x)
    ends[:6] += 0.5  # the row is perfect on those that are held out, and on no others
    refined = refine(replace(targets, states={**targets.states, 0.0: [ends]}), row)
    assert refined.report["refined"]["kept"] == "row given"
    assert (refined.solver, refined.form, refined.origin.kind) == (row.solver, row.form, "distilled")
    assert refined.sha256 == row.sha256
    assert refined.errors == row.errors
    assert refined.report["after_steps"] == row.report["after_steps"]


@pytest.mark.parametrize(("solver", "own"), [("dpmpp_2m", None), ("<mine>", sample_euler)])
def test_the_plain_solver_comes_back_as_such_where_nothing_is_nearer(solver, own):
    x = latents(8)
    row = row_of(solver, weights=np.array([0, 9.0, -9.0, 9.0]))

    def mine(*args, **kwargs):
        return own(*args, **kwargs)

    sampler = mine if own else None
    ends = (own or SOLVERS[solver])(two_peaks, x, SIGMAS, disable=True)
    ends[:6] += 0.5
    targets = taught(on(x), solver=sampler or solver)
    refined = refine(replace(targets, states={**targets.states, 0.0: [ends]}), row, solver=sampler)
    assert refined.report["refined"]["kept"] == "plain solver"
    assert (refined.solver, refined.origin.kind, refined.is_refined) == (solver, "plain", False)
    assert not refined.weights.any()
    assert refined.error_from() == refined.errors.stock < 1e-12
    assert None not in refined.errors.dode


def test_weights_that_no_table_holds_are_dropped():
    """They are found after hours of work: the best of the others is kept."""
    targets, _ = begun_on_eight()
    far = replace(targets, states={s: [1e4 * x for x in each] for s, each in targets.states.items()})
    row = distill(far, SIGMAS)
    assert np.abs(row.weights).max() <= LARGEST_WEIGHT
    refined = refine(far, row)
    stages = refined.report["refined"]["stages"]
    assert refined.report["refined"]["kept"] != min(stages, key=lambda stage: stage["distance"])["stage"]
    assert refined.errors.dode[0] <= row.errors.dode[0]


def test_harmful_weights_are_dropped():
    row = row_of(weights=np.array([0, 9.0, -9.0, 9.0]))
    refined = refine(taught(on(latents(8))), row)
    report = stages(refined)
    assert report["row given"]["held_out_error"] > report["plain solver"]["held_out_error"]
    assert refined.error_from() < report["plain solver"]["held_out_error"]


@pytest.mark.parametrize(("solver", "weight"), [("euler", 1000), ("euler", -1000), ("heun", 1000)])
def test_weights_that_no_latent_stands_end_with_a_fit_of_the_plain_solver(weight, solver):
    """The largest there may be: the row given ends far away, which is no error and no loop."""
    evaluations = (2, 2, 2, 1) if solver == "heun" else (1, 1, 1, 1)
    lambdas = weight * (np.arange(sum(evaluations)) > 0) * (-1.0) ** np.arange(sum(evaluations))
    row = row_of(solver, weights=lambdas, evaluations=evaluations)
    model = Counting()
    targets = taught(on(latents(8).float(), model), SIGMAS.float(), solver)
    before = model.evaluations
    refinement = Refinement(targets, row)
    with within(30):
        refined = refinement.run()
    assert model.evaluations - before <= refinement.plan.evaluations
    plain = replace(row, weights=0 * lambdas)
    assert refined.error_from() <= held_out_error(plain, targets) * (1 + 1e-6)
    assert refined.report["refined"]["kept"] != "row given"
    given, *_ = refinement.stages
    assert not given.held_out_error < 1e3
    assert LambdaRow.from_json(refined.to_json(), refined.arrays()) == refined  # no infinity in it


def test_a_model_that_no_start_comes_through_is_an_error():
    targets, row = begun_on_eight()
    asked = []

    def breaks(x, sigma):
        asked.append(len(x))
        return x * float("nan")

    refinement = Refinement(replace(targets, latents=on(latents(8), breaks)), row)
    with pytest.raises(DodeError, match="this row and its plain solver both return NaN or infinite values"):
        refinement.run()
    assert len(asked) < 10
    assert refinement.best.sha256 == row.sha256


# --- What is reported ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun"])
def test_report_says_what_sampling_shows(solver):
    targets, row = begun(on(latents(9)), solver=solver)
    refined = refine(targets, row, settings={"cfg": 3})
    report = refined.report
    assert refined.error_from() == pytest.approx(held_out_error(refined, targets), rel=1e-6)
    plain = replace(row, weights=0 * row.weights)
    assert refined.errors.stock == pytest.approx(held_out_error(plain, targets), rel=1e-6)
    assert refined.errors.latents == 2
    assert "after_steps" not in report
    assert (report["fitted_latents"], report["held_out_latents"], report["checked"]) == (7, 2, True)
    assert report["teacher_error"] == targets.own_error
    assert (refined.settings["cfg"], refined.settings["teacher"]) == (3, "dpmpp_2m")
    assert (refined.origin.kind, refined.origin.solver) == ("refined", solver)
    assert np.array_equal(refined.origin.sigmas, row.sigmas)
    kept = stages(refined)[report["refined"]["kept"]]
    assert kept["held_out_error"] == refined.error_from()
    narrow = [s["distance"] for name, s in stages(refined).items() if "," not in name]
    assert kept["distance"] <= min(narrow)
    assert "interrupted" not in report["refined"]


def test_later_starts_of_moved_sigmas_are_from_states_that_the_teacher_reaches():
    """On a Gaussian they are known: the teacher did not stop there, and goes on to them as finely as before."""
    model, x = Gaussian(flow=False), latents(8)
    targets, row = begun(on(x, model), scale=60)
    row = replace(row, weights=3 * row.weights)  # so that there is something to refine
    refined = refine(targets, row)
    moved = [i for i in range(1, 4) if not math.isclose(refined.sigmas[i], row.sigmas[i], rel_tol=1e-4)]
    assert refined.has_own_sigmas
    assert moved
    exact = model.solve(x[6:], SIGMAS[0], SIGMAS[-1])
    for step in range(1, 4):
        sigmas = torch.from_numpy(refined.sigmas.copy())
        start = model.solve(x[6:], sigmas[0], sigmas[step])
        end = sample_dode(model, start, sigmas[step:], disable=True, row=refined)
        assert refined.errors.dode[step] == pytest.approx(root_mean_square(end - exact), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("solver", ["heun", "dpm_solver_3"])
def test_later_starts_of_a_kept_schedule_are_from_the_teachers_states(solver):
    sigmas = karras(5)
    targets, row = begun(on(latents(8)), sigmas, solver)
    refined = refine(targets, row)
    assert refined.is_refined
    (batch,) = targets.latents.batches(targets.latents.held_out)
    for step, error in enumerate(refined.errors.dode):
        assert (error is None) == (refined.evaluations[step] == 0)
        if step and error is not None:
            start = targets.of(batch, sigmas[step].item())
            end = sample_dode(two_peaks, start, sigmas[step:], disable=True, row=refined)
            assert error == pytest.approx(root_mean_square(end - targets.of(batch, 0.0)), rel=1e-9)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_plain_solver_that_has_been_measured_is_not_measured_again(solver):
    model, subject = Counting(), on(latents(12))
    targets, row = begun(on(latents(12), model), solver=solver)
    once, again = (Refinement(targets, row, budget=2, measured=measured).run() for measured in (True, False))
    assert once.errors == again.errors
    assert np.array_equal(once.weights, again.weights)
    later = [sum(each.report["evaluations"].values()) for each in (again, once)]
    assert later[0] - later[1] == sum(later_evaluations(row.plain)) * len(targets.latents.held_out)
    teacher = plan_teacher(subject, SIGMAS, Teacher(scale=5), solvers=solver)
    plans = [plan_refinement(teacher, row, 2, measured=measured) for measured in (True, False)]
    assert plans[0].checking < plans[1].checking


def later_evaluations(row):
    """Of the runs from each later step of its own."""
    return [sum(row.evaluations[step:]) for step in range(1, row.steps) if row.evaluations[step]]


def test_goes_through_a_file(tmp_path):
    refined = refine(*begun_on_eight())
    path = LambdaTable([refined]).save(tmp_path / "refined.safetensors")
    (again,) = LambdaTable.load(path).rows
    assert again == refined
    x = latents(3, seed=5)
    assert torch.equal(
        sample_dode(two_peaks, x, again.sigmas, disable=True, row=again),
        sample_dode(two_peaks, x, refined.sigmas, disable=True, row=refined),
    )


def test_its_schedule_is_found_in_parts():
    refined = refine(*begun_on_eight())
    assert refined.find(refined.sigmas[2:]).step == 2
    end = sample_dode(
        two_peaks, latents(2, sigma=refined.sigmas[2]), refined.sigmas[2:], disable=True, row=refined
    )
    assert end.isfinite().all()


# --- Cost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("budget", [None, 1.5])
def test_costs_at_most_what_is_said_before(solver, budget):
    model, told = Counting(), Telling()
    subject = on(latents(12), model)
    teacher = plan_teacher(subject, SIGMAS, Teacher(scale=5), solvers=solver)
    zeros = row_of(solver, evaluations=(2, 2, 2, 1) if solver == "heun" else None)
    plan = plan_refinement(teacher, zeros, budget)
    targets, row = begun(subject, solver=solver)
    before = model.evaluations
    assert Refinement(targets, row, budget=budget).plan == plan
    refined = refine(targets, row, budget=budget, progress=told)
    spent = refined.report["evaluations"]
    already = row.report["evaluations"]["later starts"]  # of the row that it began with
    assert sum(spent.values()) == model.evaluations
    assert spent["refining"] <= plan.fitting
    assert 0 < spent["later starts"] - already <= plan.checking
    told.check(planned=plan.evaluations, spent=model.evaluations - before)
    assert list(dict.fromkeys(note.stage for note in told)) == ["refining", "later starts"]
    assert plan.fitted == refined.report["fitted_latents"]
    if budget is not None:
        assert plan.fitting <= budget * UNIT * row.nfe * 12


def test_refining_twice_adds_up():
    model = Counting()
    targets, row = begun(on(latents(6), model))
    twice = refine(targets, refine(targets, row))
    assert sum(twice.report["evaluations"].values()) == model.evaluations


@pytest.mark.parametrize(
    ("solver", "evaluations", "starts"), [("euler", (1, 1, 1, 1), 2), ("heun", (2, 2, 2, 1), 1)]
)
def test_without_lambda_the_row_given_and_the_plain_solver_are_run_once(solver, evaluations, starts):
    """They are one student; iPNDM-3, which Euler can become, is another."""
    model = Counting()
    targets = taught(on(latents(8), model), solver=solver)
    row = row_of(solver, evaluations=evaluations)
    refinement = Refinement(targets, row)
    before = model.evaluations
    running = refinement.stage_by_stage()
    names = [next(running).name for _ in range(starts)]
    assert names == ["row given", "iPNDM-3"][:starts]
    assert model.evaluations - before == starts * 8 * row.nfe
    assert next(running).name == "Jacobian 1"
    assert refinement.run().errors.stock == pytest.approx(held_out_error(row, targets), rel=1e-9)
    assert refinement.plan.fitting >= refinement.stages[-1].evaluations + 8 * row.nfe  # for another's weights


TEACHERS = {solver: plan_teacher(on(latents(1)), SIGMAS, solvers=solver) for solver in ("euler", "heun")}


@given(latents=st.integers(2, 200), budget=st.floats(0.5, 50), solver=st.sampled_from(["euler", "heun"]))
@settings(deadline=None, max_examples=25)
def test_a_budget_buys_latents_then_jacobians_and_never_more(latents, budget, solver):
    row = row_of(solver, evaluations=(2, 2, 2, 1) if solver == "heun" else None)
    teacher = replace(TEACHERS[solver], latents=on(torch.ones(latents, 1)))
    everything = plan_refinement(teacher, row)
    assert (everything.fitted, everything.jacobians) == (latents - max(1, latents // 4), JACOBIANS)
    assert plan_refinement(teacher, row, math.inf) == everything
    try:
        plan = plan_refinement(teacher, row, budget)
    except DodeError:
        with pytest.raises(DodeError, match="too small"):
            plan_refinement(teacher, row, budget / 2)
        return
    assert plan.fitting <= min(budget * UNIT * row.nfe * latents, everything.fitting)
    assert plan.fitted >= min(FEW_LATENTS, everything.fitted) or plan.jacobians == 1
    assert plan_refinement(teacher, row, 2 * budget).fitting >= plan.fitting


def test_a_budget_that_pays_for_nothing_is_refused_before_it_is_spent():
    model = Counting()
    targets, row = begun(on(latents(8), model))
    before = model.evaluations
    with pytest.raises(DodeError, match=r"0.01 is too small: .* takes at least 0\.\d+$"):
        refine(targets, row, budget=0.01)
    for budget in (0, -1, float("nan"), -math.inf):
        with pytest.raises(DodeError, match="must be a positive number"):
            refine(targets, row, budget=budget)
    assert model.evaluations == before


# --- The same, however it is computed -----------------------------------------------------------------


def assert_near(refined, expected):
    np.testing.assert_allclose(refined.weights, expected.weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(refined.sigmas, expected.sigmas, rtol=1e-5)
    assert refined.errors.dode == pytest.approx(expected.errors.dode, rel=1e-4)


def test_micro_batches_and_groups_make_no_difference():
    x = latents(9)
    expected = refine(*begun(on(x)))
    order = [0, 1, 2, 3, 7, 4, 5, 6, 8]  # the last of either group is held out, as the last two of one group
    groups = [Group(two_peaks, x[order[:5]]), Group(two_peaks, x[order[5:]])]
    for subject in (on(x, micro_batch=1), on(x, micro_batch=4), Latents(groups, 4)):
        assert_near(refine(*begun(subject)), expected)


@pytest.mark.parametrize("shapes", [("8x8", "4x6"), ("video", "8x8")], ids=" beside ".join)
def test_groups_of_different_shapes_weigh_the_same(shapes):
    x = latents(8, 2, 4, 2)
    budget = 8  # too small for weights per band, which see the neighbours of a number
    expected = refine(*begun(on(x[[0, 1, 2, 4, 5, 6, 3, 7]])), budget=budget)
    assert expected.is_refined
    for size in (None, 3):
        assert_near(refine(*begun(in_shapes(x, *shapes, micro_batch=size)), budget=budget), expected)


def test_each_group_has_its_own_model_and_arguments():
    def shifted(x, sigma, shift=None):
        return two_peaks(x - shift.reshape(-1, 1, 1, 1), sigma) + shift.reshape(-1, 1, 1, 1)

    labels = torch.tensor([0.0, 0.3, 0.6, 0.9], dtype=torch.float64)
    groups = [Group(shifted, latents(4, seed=s), lambda i, s=s: {"shift": labels[i] + s}) for s in (0, 1)]
    targets, row = begun(Latents(groups))
    assert refine(targets, row).error_from() < row.error_from()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_precision_and_any_rank(dtype):
    def model(x, sigma, **extra_args):
        return two_peaks(x.float(), sigma.float()).to(x.dtype)

    targets, row = begun(on(latents(8, 2, 3, 2, 2).to(dtype), model), SIGMAS.float())
    assert refine(targets, row).error_from() <= row.error_from()


# --- Interrupted, and asked at any time ----------------------------------------------------------------


@pytest.mark.parametrize("after", [0.0, 0.05, 0.1, 0.8])
@pytest.mark.parametrize("kind", [Interrupted, KeyboardInterrupt])
def test_interrupt_passes_on_and_leaves_the_best_row(after, kind):
    targets, row = begun_on_eight()
    refinement, interrupt, told = Refinement(targets, row), kind(), Telling()

    def stop(p):
        told(p)
        if p.done > after * refinement.plan.fitting:
            raise interrupt

    with pytest.raises(kind) as caught:
        refinement.run(stop)
    assert caught.value is interrupt
    best = refinement.best
    assert best.report["refined"]["interrupted"] is True
    assert [s["stage"] for s in best.report["refined"]["stages"]] == [s.name for s in refinement.stages]
    better = held_out_error(best, targets) < held_out_error(row, targets)
    assert better == best.is_refined == (after == 0.8)
    assert better or best.sha256 == row.sha256
    assert (told[0].total, told[-1].stage) == (refinement.plan.evaluations, "refining")


def test_interrupted_after_the_fit_it_has_all_but_the_later_starts():
    targets, row = begun_on_eight()
    refinement, whole = Refinement(targets, row), refine(targets, row)

    def stop(p):
        if p.stage == "later starts":
            raise Interrupted

    with pytest.raises(Interrupted):
        refinement.run(stop)
    best = refinement.best
    assert best.sha256 == whole.sha256
    assert best.errors.dode == (whole.error_from(), None, None, None)
    assert "interrupted" not in best.report["refined"]


def test_it_can_be_asked_before_during_and_after_its_stages():
    targets, row = begun_on_eight()
    refinement = Refinement(targets, row)
    assert (refinement.stages, refinement.best.sha256) == ([], row.sha256)
    assert refinement.best.report["refined"] == {"kept": "row given", "stages": [], "interrupted": True}
    assert refinement.best.report["evaluations"]["refining"] == 0
    least = math.inf
    for count, stage in enumerate(refinement.stage_by_stage(), start=1):
        assert refinement.stages[-1] is stage
        assert len(refinement.stages) == count
        least = min(least, stage.held_out_error)
        best = refinement.best
        assert held_out_error(best, targets) == pytest.approx(least, rel=1e-9)
        assert best.report["refined"]["interrupted"]
        assert best.report["evaluations"]["refining"] == stage.evaluations
        if stage.name == "Jacobian 1":
            break
    assert refinement.best == best
    assert best.is_refined
    names = [stage.name for stage in refinement.stage_by_stage()]  # from the beginning, to the end
    assert [stage.name for stage in refinement.stages] == names
    assert names[:4] == ["row given", "plain solver", "iPNDM-3", "Jacobian 1"]
    assert "interrupted" not in refinement.best.report["refined"]


def test_a_second_run_finds_the_same():
    targets, row = begun_on_eight()
    refinement = Refinement(targets, row)
    first = refinement.run()
    assert refinement.best == first
    assert refinement.run() == first == refine(targets, row)


def test_leaving_the_loop_gives_back_what_was_planned_for_the_rest():
    targets, row = begun_on_eight()
    refinement, told = Refinement(targets, row), Telling()
    work = Progress(refinement.plan.evaluations, told)
    (part,) = work.split(refinement.plan.fitting)
    running = refinement.stage_by_stage(part)
    next(running)
    running.close()
    assert part.done == part.total == refinement.stages[0].evaluations
    assert work.total == part.total + refinement.plan.checking


def test_nan_is_an_error_that_leaves_the_best_row():
    calls = iter(range(10**6))

    def breaks(x, sigma, **extra_args):
        return two_peaks(x, sigma) * (float("nan") if next(calls) == 30 else 1)

    targets, row = begun_on_eight()
    refinement = Refinement(replace(targets, latents=on(latents(8), breaks)), row)
    with pytest.raises(DodeError, match="NaN"):
        refinement.run()
    assert [stage.name for stage in refinement.stages] == ["row given", "plain solver", "iPNDM-3"]
    assert held_out_error(refinement.best, targets) <= held_out_error(row, targets)


# --- Rows that it takes, and those that it does not ------------------------------------------------------


def test_a_refined_row_can_be_refined_again():
    targets, row = begun_on_eight()
    once = refine(targets, row)
    again = refine(targets, once)
    assert stages(again)["row given"]["held_out_error"] == pytest.approx(once.error_from(), rel=1e-9)
    assert again.form == "history"


def test_one_latent_is_fitted_and_not_checked():
    refined = refine(taught(on(latents(1))), row_of(weights=np.array([0, 0.1, 0, 0])))
    assert refined.report["checked"] is False
    assert refined.errors is None
    assert refined.is_refined
    assert stages(refined)["plain solver"]["held_out_error"] is None
    assert "later starts" not in refined.report["evaluations"]


def test_fresh_arguments_for_every_run():
    sampler = writes_into_what_it_is_given
    subject = on(latents(4), extra_args={"model_options": {}, "seed": 1})
    targets, row = begun(subject, solver=sampler)
    assert refine(targets, row, solver=sampler).error_from() < row.error_from()


@pytest.mark.parametrize(
    ("row", "arguments", "why"),
    [
        (row_of(sigmas=karras(1)), {}, "with one evaluation there is nothing to refine"),
        (row_of(weights=np.zeros(5), evaluations=(2, 1, 1, 1)), {}, "different steps"),
        (row_of("<mine>"), {}, "your own sampler function"),
        (row_of("euler"), {"solver": "heun"}, "not 'heun'"),
        (row_of(), {"settings": {"a": object()}}, "JSON"),
        (row_of(), {"settings": {"cfg": -3}}, "settings: 'cfg' cannot be -3"),
        (row_of(sigmas=karras(4, sigma_max=10.0)), {}, "no state at σ = 10"),
    ],
)
def test_bad_input_is_refused_before_any_evaluation(row, arguments, why):
    model = Counting()
    targets = taught(on(latents(4), model), scale=1)
    before = model.evaluations
    with pytest.raises(DodeError, match=why) as caught:
        refine(targets, row, **arguments)
    assert "\n" not in str(caught.value)
    assert model.evaluations == before


def test_stochastic_samplers_are_refused():
    def noisy(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return sample_euler(model, x + torch.randn_like(x), sigmas, extra_args, callback, disable)

    with pytest.raises(IneligibleSampler, match="stochastic"):
        refine(taught(on(latents(4)), scale=1), row_of("<noisy>"), solver=noisy)


def test_every_single_stage_solver_becomes_weights():
    for solver in ("euler", "dpmpp_2m", "dpmpp_3m", "ipndm", "deis"):
        refined = refine(taught(on(latents(4)), scale=2), row_of(solver), budget=20)
        assert refined.form == "history" or refined.report["refined"]["kept"] == "row given"
    assert set(SOLVERS) > {"heun"}


def test_errors_of_a_row_from_elsewhere_are_measured_again():
    """They were of other latents."""
    targets, row = begun_on_eight()
    elsewhere = replace(row, errors=HeldOutErrors(100, (1e-9, None, None, None), 2e-9))
    refined = refine(targets, elsewhere)
    assert refined.errors == refine(targets, row).errors
