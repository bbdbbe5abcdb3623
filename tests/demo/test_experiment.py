"""The demo's computation: what is compared, on which latents, and that the numbers are right."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from dode_nodes import DodeError, sample_dode
from dode_nodes.demo import experiment
from dode_nodes.demo.experiment import STUDENTS, check_settings, seeds_to_fit
from dode_nodes.demo.models import load_demo_model
from tests.demo.small import FRESH


def test_the_rows_come_from_one_pipeline_with_one_run_of_the_teacher(ran, demo):
    (pipeline,) = ran.pipelines
    assert list(demo.table.rows) == pipeline.rows
    teaching = [done for stage, done, _ in ran.told if stage == "teacher"]
    assert teaching[-1] == pipeline.cost.teacher == pipeline.targets.evaluations


def test_the_total_is_known_from_the_start_and_only_shrinks(ran):
    (pipeline,) = ran.pipelines
    totals = [total for *_, total in ran.told]
    done = [done for _, done, _ in ran.told]
    reference, samplers, schedules = 12 + 6, 2 * len(STUDENTS), len(STUDENTS) + 1
    measuring = FRESH * (reference + (2 + 3) * (samplers + schedules))
    assert totals[0] == pipeline.cost.total + measuring
    assert all(after <= before for before, after in pairwise(totals))
    assert all(after >= before for before, after in pairwise(done))
    assert done[-1] == totals[-1] < totals[0]
    assert done[0] > 0


def test_every_budget_has_a_row_per_student_and_a_refined_one(demo):
    assert demo.budgets == (2, 3)
    for budget in demo.budgets:
        rows = [row for row in demo.table.rows if row.steps == budget]
        assert [row.solver for row in rows if not row.is_refined] == list(STUDENTS)
        assert sum(row.is_refined for row in rows) == 1
        assert len(demo.distilled(budget)) == len(rows)
        assert len(demo.stock(budget)) == 2 * len(STUDENTS)  # on a schedule with both endings
        assert {result.trial.evaluations for result in demo.stock(budget)} == {budget}


def test_nothing_is_compared_on_latents_that_were_fitted_on(demo):
    assert len(demo.latent_seeds) == 4
    assert len(demo.fresh_seeds) == FRESH
    assert not set(demo.latent_seeds) & set(demo.fresh_seeds)
    assert not set(seeds_to_fit(0, 1000)) & set(seeds_to_fit(1, 1000))


def test_what_is_compared_is_what_the_samplers_give_on_fresh_noise(demo):
    model = load_demo_model("eps")
    noise, labels = model.noise(demo.fresh_seeds), torch.arange(FRESH)

    def sampled(trial: experiment.Trial) -> torch.Tensor:
        solver = None if trial.row is not None else trial.solver
        return sample_dode(
            model.denoiser(1.5), noise, trial.sigmas, {"labels": labels}, disable=True, row=trial.row, solver=solver
        )  # fmt: skip

    converged = sampled(demo.converged.trial)
    torch.testing.assert_close(demo.converged.latents, converged, rtol=0, atol=1e-4)
    results = [demo.best_stock(2), demo.chosen(3), *demo.distilled(2)]
    for result in results:
        latents = sampled(result.trial)
        torch.testing.assert_close(result.latents, latents, rtol=0, atol=1e-4)
        error = (latents - converged).square().mean().sqrt().item()
        assert result.error == pytest.approx(error, rel=1e-3)
        assert result.error == pytest.approx(math.sqrt(result.errors.square().mean()), rel=1e-6)


def test_the_row_is_chosen_without_a_look_at_the_fresh_latents(demo):
    for budget in demo.budgets:
        chosen = demo.chosen(budget).trial.row
        assert chosen.error_from() == min(result.trial.row.error_from() for result in demo.distilled(budget))
        assert demo.best_stock(budget).error == min(result.error for result in demo.stock(budget))


def test_a_variant_is_set_beside_its_own_solver_on_its_own_schedule(demo):
    for result in demo.distilled(3):
        plain = demo.undistilled(result)
        assert plain.trial.row is None
        assert plain.trial.solver == result.trial.row.plain.solver
        assert plain.trial.sigmas.tolist() == pytest.approx(result.trial.row.plain.sigmas.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("steps", "cfg", "seed"),
    [((), 2.0, 0), ((0,), 2.0, 0), ((8, 257), 2.0, 0), ((8,), -3.0, 0), ((8,), math.nan, 0),
     ((8,), math.inf, 0), ((8,), 2.0, -1), ((8,), 2.0, 2**32)],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(steps, cfg, seed):
    with pytest.raises(DodeError):
        check_settings(steps, cfg, seed)


def test_settings_at_the_edge_are_taken():
    check_settings((1, 256), 0.0, 2**32 - 1)
