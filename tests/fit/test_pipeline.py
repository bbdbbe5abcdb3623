"""The pipeline: its rows are those of its parts, it says before what it may cost, and keeps what it found."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import pytest
import torch

from dode_nodes import (
    DodeError,
    Group,
    LambdaRow,
    Latents,
    Pipeline,
    Progress,
    Recipe,
    Teacher,
    distill,
    plan_teacher,
    refine,
    run_teacher,
)
from dode_nodes.fit.scope import UNIT
from dode_nodes.sampling.probe import probe_student
from dode_nodes.sampling.schedules import NoiseSchedule, schedules_of
from dode_nodes.sampling.solvers import SOLVERS, sample_euler
from tests.oracles import two_peaks
from tests.toys import Counting, Interrupted, Telling, in_shapes, karras, latents

SCHEDULES = [karras(3), karras(4)]
TEACHER = Teacher(scale=4)
SD = NoiseSchedule.stable_diffusion()
schedule_of = schedules_of(SD)


def on(model=two_peaks):
    return Latents([Group(model, latents(5)), Group(model, latents(3, seed=1))])


def pipeline(model=two_peaks, schedules=SCHEDULES, **recipe):
    return Pipeline(on(model), schedules, Recipe(**{"teacher": TEACHER} | recipe))


# --- The recipe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("solvers", [], "give at least one solver to distil"),
        ("predictions", [], "predictions must be among"),
        ("predictions", ["epsilon"], "predictions must be among"),
        ("predictions", ["noise", "velocity"], "predictions must be among"),
        ("refine_budget", -1, "at least 0, not -1"),
        ("refine_budget", math.nan, "at least 0, not nan"),
        ("settings", {"cfg": -3}, "settings: 'cfg' cannot be -3"),
        ("settings", {"cfg": math.inf}, "settings cannot be stored as JSON"),
        ("settings", {"seed": "1"}, "settings: 'seed' cannot be"),
        ("settings", {"schedule": "a<b"}, "settings: 'schedule' cannot be"),
    ],
)
def test_a_recipe_is_checked_where_it_is_made(field, value, why):
    with pytest.raises(DodeError, match=why):
        Recipe(**{field: value})


def test_a_recipe_cannot_be_changed():
    given = {"solvers": ["heun"], "predictions": ["data"], "settings": {"cfg": 3}}
    recipe = Recipe(**given)
    given["solvers"].append("euler")
    given["settings"]["cfg"] = -3
    assert (recipe.solvers, recipe.predictions, recipe.settings["cfg"]) == (("heun",), ("data",), 3)
    with pytest.raises(FrozenInstanceError):
        recipe.refine_budget = 3
    with pytest.raises(TypeError):
        recipe.settings["cfg"] = -3


# --- Its rows -----------------------------------------------------------------------------------------


def greedy_rows(targets, schedule, solver):
    return [distill(targets, schedule, solver=solver, prediction=p) for p in ("noise", "data")]


def test_rows_are_those_of_its_parts():
    rows = pipeline(solvers=["dpmpp_2m"], refine_budget=6).run()
    targets = run_teacher(on(), SCHEDULES, TEACHER, solvers="dpmpp_2m")
    greedy = [min(greedy_rows(targets, s, "dpmpp_2m"), key=LambdaRow.error_from) for s in SCHEDULES]
    assert rows[:2] == greedy
    for row, begun in zip(rows[2:], greedy, strict=True):
        again = refine(targets, begun)
        assert row.report["refined"]["stages"][0] == again.report["refined"]["stages"][0]
        assert row.error_from() < begun.error_from()
        assert None not in row.errors.dode


def test_of_several_solvers_the_best_of_each_schedule_is_refined():
    solvers = ["euler", "heun"]
    found = pipeline(solvers=solvers, refine_budget=math.inf)
    rows = found.run()
    targets = run_teacher(on(), SCHEDULES, TEACHER, solvers=solvers)
    greedy = [
        min(greedy_rows(targets, schedule, solver), key=LambdaRow.error_from)
        for schedule in SCHEDULES
        for solver in solvers
    ]
    assert rows[:4] == greedy
    for i, refined in enumerate(rows[4:]):
        best = min(greedy[2 * i : 2 * i + 2], key=LambdaRow.error_from)
        assert refined.origin.solver == best.solver
        assert refined.report["refined"]["stages"][0]["held_out_error"] == pytest.approx(best.error_from())
        assert refined.sha256 == refine(targets, best).sha256
    assert len(rows) == 6


def test_a_second_run_finds_the_same_rows_and_no_more():
    subject = pipeline(refine_budget=6)
    first = list(subject.run())
    assert subject.run() == first == subject.found
    assert len(first) == 4


@pytest.mark.parametrize("shapes", [("8x8", "4x6"), ("video", "8x8")], ids=" beside ".join)
def test_groups_may_differ_in_shape(shapes):
    x = latents(8, 2, 4, 2)[[0, 1, 2, 4, 5, 6, 3, 7]]  # both groups' last ones are held out
    together = in_shapes(x[[0, 1, 2, 6, 3, 4, 5, 7]], *shapes)
    rows, expected = (
        Pipeline(subject, SCHEDULES[:1], Recipe(teacher=TEACHER, refine_budget=8)).run()
        for subject in (together, Latents.of(two_peaks, x))
    )
    for row, alone in zip(rows, expected, strict=True):
        assert row.errors.dode == pytest.approx(alone.errors.dode, rel=1e-4)
        assert row.weights == pytest.approx(alone.weights, rel=1e-4, abs=1e-6)


def test_a_callable_solver_is_refined_too():
    def ralston(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma, sigma_next in pairwise(sigmas):
            d = (x - model(x, sigma.expand(len(x)), **extra_args)) / sigma
            if sigma_next > 0:
                mid = sigma + (sigma_next - sigma) * 2 / 3
                x_mid = x + d * (mid - sigma)
                d = d / 4 + (x_mid - model(x_mid, mid.expand(len(x)), **extra_args)) / mid * 3 / 4
            x = x + d * (sigma_next - sigma)
        return x

    rows = pipeline(schedules=SCHEDULES[:1], solvers=[ralston], refine_budget=20).run()
    assert [row.solver for row in rows] == ["<ralston>"] * len(rows)
    assert torch.isfinite(torch.tensor(rows[-1].weights)).all()


def test_settings_are_in_every_row():
    rows = pipeline(refine_budget=6, settings={"cfg": 2.5, "scheduler": "karras"}).run()
    assert {(row.settings["cfg"], row.settings["scheduler"], row.settings["scale"]) for row in rows} == {
        (2.5, "karras", 4)
    }


# --- The teacher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["simple", "beta", "kl_optimal"])
def test_the_teacher_is_as_fine_wherever_a_fit_begins(name):
    """A schedule that is coarse where the solution bends would bring the target itself away from it."""
    x = Latents([Group(two_peaks, latents(4, sigma=SD.sigma_max))])
    student, usual = schedule_of(name, 5, False), schedule_of("karras", 5, False)
    planned = Recipe(teacher=TEACHER, make_sigmas=schedule_of).teacher_run(x, [student])
    converged = run_teacher(x, usual, Teacher(scale=60)).ends[0]

    def distance(targets):
        return float((targets.ends[0] - converged).square().mean().sqrt())

    targets = planned()
    of_usual, of_student = (distance(run_teacher(x, each, TEACHER)) for each in (usual, student))
    assert distance(targets) < 1.2 * of_usual < of_student
    targets.check(student.tolist())


def test_where_a_fit_begins_as_usual_the_teacher_divides_its_steps():
    x, usual = Latents([Group(two_peaks, latents(2))]), schedule_of("karras", 5, False)
    planned = Recipe(teacher=TEACHER, make_sigmas=schedule_of).teacher_run(x, [usual])
    assert torch.equal(planned.passes[0].run.sigmas, plan_teacher(x, usual, TEACHER).passes[0].run.sigmas)


def _refused(name, steps, discard):
    raise DodeError("no such schedule")


@pytest.mark.parametrize(
    "make_sigmas",
    [
        None,
        _refused,
        lambda name, steps, discard: schedule_of(name, steps, discard) * 1.1,
        lambda name, steps, discard: schedule_of(name, steps + 1, discard),
    ],
    ids=["unknown", "refused", "begins elsewhere", "of other steps"],
)
def test_where_the_usual_schedule_does_not_serve_the_teacher_divides_the_students_steps(make_sigmas):
    x, student = Latents([Group(two_peaks, latents(2))]), schedule_of("simple", 5, False)
    found = Recipe(teacher=TEACHER, make_sigmas=make_sigmas).teacher_run(x, [student])
    assert torch.equal(found.passes[0].run.sigmas, plan_teacher(x, student, TEACHER).passes[0].run.sigmas)


# --- One evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [[], [schedule_of("karras", 3, False)]])
def test_with_a_first_step_that_is_free_one_evaluation_is_refined(others):
    """And not where nobody may begin so: on other schedules, in some hosts, or with no budget for it."""
    start = schedule_of("karras", 1, False)
    group = Group(two_peaks, latents(24))
    recipe = Recipe(teacher=TEACHER, refine_budget=100, make_sigmas=schedule_of)
    subject = Pipeline(Latents([group]), [start, *others], recipe)
    assert subject.remarks == []
    plain, *_, refined = [row for row in subject.run() if row.nfe == 1]
    assert (refined.is_refined, refined.steps, refined.free.first) == (True, 2, True)
    assert refined.error_from() < 0.9 * plain.error_from()
    for latents_given, changes in (
        (Latents([group], free_first=False), {}),
        (
            Latents([group]),
            {"make_sigmas": lambda name, steps, discard: schedule_of(name, steps, discard) * 1.1},
        ),
        (Latents([group]), {"refine_budget": 0.0}),
    ):
        without = Pipeline(latents_given, [start], replace(recipe, **changes))
        assert "with one evaluation there is nothing to fit" in without.remarks[0]
        assert without.cost.refining == ()


@pytest.mark.parametrize("others", [[], SCHEDULES[:1]])
def test_one_step_is_legal_remarked_on_and_not_refined(others):
    subject = pipeline(schedules=[karras(1), *others], refine_budget=6)
    assert len(subject.remarks) == 1
    assert "with one evaluation there is nothing to fit" in subject.remarks[0]
    assert len(subject.cost.refining) == len(others)
    rows = subject.run()
    assert [row.steps for row in rows] == [1, *[3] * 2 * len(others)]
    assert [row.is_refined for row in rows] == [False, *[False, True] * len(others)]
    assert rows[0].weights.tolist() == [0]
    assert pipeline().remarks == []


def two_stages(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Two evaluations a step, the last one, too."""
    for sigma, sigma_next in pairwise(sigmas):
        d = (x - model(x, sigma.expand(len(x)), **extra_args)) / sigma
        mid = (sigma + sigma_next) / 2
        x_mid = x + d * (mid - sigma)
        x = x + (x_mid - model(x_mid, mid.expand(len(x)), **extra_args)) / mid * (sigma_next - sigma)
    return x


def two_stages_and_off(*args, **kwargs):
    return two_stages(*args, **kwargs) + 3


@pytest.mark.parametrize(
    ("solvers", "refined"),
    [
        (["euler", two_stages], ["<two_stages>"]),
        ([two_stages, "euler"], ["<two_stages>"]),
        (["euler", two_stages_and_off], []),
    ],
)
def test_of_one_step_only_a_row_of_two_evaluations_is_refined(solvers, refined):
    """Which solver will be the better one is not known before."""
    model, told = Counting(), Telling()
    subject = pipeline(model, schedules=[karras(1)], solvers=solvers, refine_budget=20)
    assert subject.remarks == []
    rows = subject.run(told)
    told.check(planned=subject.cost.total, spent=model.evaluations)
    assert [row.solver for row in rows if "refined" in row.report] == refined


# --- What it costs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "solvers"), [(0, ["euler"]), (3, ["euler"]), (3, ["dpmpp_2m", "heun"]), (math.inf, ["ipndm"])]
)
def test_cost_is_known_before_and_counted_down(budget, solvers):
    model, told = Counting(), Telling()
    subject = pipeline(model, refine_budget=budget, solvers=solvers)
    assert model.evaluations == 0
    cost = subject.cost
    assert str(cost).startswith(f"at most {cost.total} evaluations: teacher {cost.teacher}")
    assert ("refining" in str(cost)) == bool(budget)
    assert cost.teacher == plan_teacher(on(), SCHEDULES, TEACHER, solvers=solvers).cost
    rows = subject.run(told)
    told.check(planned=cost.total, spent=model.evaluations)
    for plan, schedule in zip(cost.refining, SCHEDULES, strict=False):
        most = max(len(probe_student(SOLVERS[solver], schedule).sigmas) for solver in solvers)
        assert plan.fitting <= budget * UNIT * most * len(on())
    stages = list(dict.fromkeys(note.stage for note in told))
    assert stages[0] == "teacher"
    assert ("refining" in stages) == bool(budget)
    teaching = rows[0].report["evaluations"]["teacher"]
    greedy = [row for row in rows if not row.is_refined]
    assert teaching == cost.teacher
    assert sum(sum(row.report["evaluations"].values()) - teaching for row in greedy) <= sum(cost.students)


def test_it_can_be_a_part_of_something_longer():
    told = Telling()
    subject = pipeline(refine_budget=3)
    work = Progress(subject.cost.total + 10, told)
    part, rest = work.split(subject.cost.total, 10)
    subject.run(part)
    with rest:
        rest.advance(10, "pictures", torch.zeros(1))
    told.check(planned=subject.cost.total + 10, spent=part.done + 10)


@pytest.mark.parametrize(("count", "share"), [(1, 1), (2, 0.5**0.5), (4, 0.5), (9, 1 / 3)])
def test_each_of_many_rows_has_a_part_of_the_budget_that_it_would_have_alone(count, share):
    schedules = [karras(n) for n in range(2, 2 + count)]
    together = pipeline(schedules=schedules, refine_budget=4).cost.refining
    alone = [pipeline(schedules=[each], refine_budget=4 * share).cost.refining for each in schedules]
    assert [plan.fitting for plan in together] == [plan.fitting for (plan,) in alone]


@pytest.mark.parametrize("budget", [0, 5, 40])
def test_the_races_of_many_rows_share_their_favourites(budget):
    """Whether a refinement races or a search for the best stock setting. What is saved a budget spends on latents."""

    x = latents(8, sigma=SD.sigma_max)

    def planned(steps, model=two_peaks):
        recipe = Recipe(teacher=TEACHER, refine_budget=budget, make_sigmas=schedule_of, predictions=["noise"])
        schedules = [schedule_of("karras", n, False) for n in steps]
        unseen = Latents.of(model, latents(4, seed=1, sigma=SD.sigma_max))
        return Pipeline(Latents.of(model, x), schedules, recipe, unseen)

    model, told = Counting(), Telling()
    subject = planned([4, 5], model)
    if budget == 0:
        alone = [planned([n]) for n in (4, 5)]
        assert sum(subject.cost.searching) < sum(sum(each.cost.searching) for each in alone)
    rows = subject.run(told)
    told.check(planned=subject.cost.total, spent=model.evaluations)
    assert [row.steps for row in rows if not row.is_refined] == [4, 5]
    tried = {row.paid_steps: row.best_stock.tried for row in rows}
    assert tried[4] < tried[5]


@pytest.mark.parametrize(("steps", "budget"), [((2, 3), 5.0), ((4, 5), math.inf)])
def test_where_little_would_be_saved_each_row_has_a_race_of_its_own(steps, budget):
    """With very few evaluations, and without a limit."""

    def plans(*counts, share=1.0):
        recipe = Recipe(teacher=TEACHER, refine_budget=budget * share, make_sigmas=schedule_of)
        schedules = [schedule_of("karras", n, False) for n in counts]
        return Pipeline(
            Latents.of(two_peaks, latents(8, sigma=SD.sigma_max)), schedules, recipe
        ).cost.refining

    assert list(plans(*steps)) == [plan for n in steps for plan in plans(n, share=0.5**0.5)]


def test_a_budget_that_pays_for_nothing_is_refused_at_once():
    with pytest.raises(
        DodeError, match=r"too small: .*\. Raise it: each of 2 rows gets 0.71 of the 0.01 that was given"
    ):
        pipeline(refine_budget=0.01)


def test_one_prediction_costs_half_and_is_kept():
    both, one = pipeline(), pipeline(predictions=["data"])
    for steps, of_both, of_one in zip((3, 4), both.cost.students, one.cost.students, strict=True):
        later = 2 * 2 * sum(range(steps))  # of the better row only, and of the plain solver
        assert of_both - later == 2 * (of_one - later)
    assert {row.prediction for row in one.run()} == {"data"}


# --- What cannot be, and what is interrupted ----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schedules": []}, "give at least one schedule"),
        ({"schedules": [karras(3), karras(3, sigma_max=9.0)]}, "must start at the same σ"),
        ({"solvers": ["euler", "nobody"]}, "no solver is called 'nobody'"),
        ({"teacher": Teacher("nobody")}, "no solver is called 'nobody'"),
    ],
)
def test_what_cannot_be_distilled_is_refused_before_any_evaluation(changes, why):
    model = Counting()
    with pytest.raises(DodeError, match=why):
        pipeline(model, **changes)
    assert model.evaluations == 0


@pytest.mark.parametrize("part", ["teacher", "student", "later starts", "refining"])
def test_interrupt_leaves_what_was_found(part):
    interrupt, told = Interrupted(), Telling()

    def stop(p):
        told(p)
        late = p.done > 0.8 * p.total - last_later_starts
        if p.stage == part and (part != "refining" or late):
            raise interrupt

    subject = pipeline(refine_budget=30)
    last_later_starts = subject.cost.refining[-1].checking
    with pytest.raises(Interrupted) as caught:
        subject.run(stop)
    assert caught.value is interrupt
    assert told[-1].stage == part
    refined = [row for row in subject.found if row.is_refined]
    greedy = {"teacher": 0, "student": 0, "later starts": 0, "refining": 2}[part]
    assert len(subject.found) - len(refined) == greedy
    assert len(refined) == (2 if part == "refining" else 0)
    if part == "refining":
        assert subject.partial is subject.found[-1]
        assert subject.partial.report["refined"]["interrupted"] is True
        assert subject.partial.error_from() < subject.rows[1].error_from()
        assert subject.run() == subject.found  # and it can be run again
        assert len(subject.found) == 4


def test_a_refinement_that_changes_nothing_is_no_further_row():
    """The greedy row, as it was, says that it was tried."""
    targets = run_teacher(on(), SCHEDULES[:1], Teacher("euler", 1))
    assert distill(targets, SCHEDULES[0]).weights == pytest.approx([0, 0, 0], abs=1e-9)
    (row,) = pipeline(
        schedules=SCHEDULES[:1], teacher=Teacher("euler", 1), predictions=["noise"], refine_budget=100
    ).run()
    assert row.report["refined"]["kept"] == "row given"
    assert row.origin.kind == "distilled"


def test_two_functions_of_the_callers_own_are_told_apart():
    def mine(*args, **kwargs):
        return sample_euler(*args, **kwargs)

    rows = pipeline(schedules=SCHEDULES[:1], solvers=[mine, two_stages], refine_budget=20).run()
    assert [row.solver for row in rows[:2]] == ["<mine>", "<two_stages>"]
    best = min(rows[:2], key=LambdaRow.error_from)
    assert rows[2].origin.solver == best.solver
