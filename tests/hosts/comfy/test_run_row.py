"""Rows as ComfyUI runs them: through a patched model, as a sampler, over masks and parts of a schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dode_nodes import DodeError, LambdaRow, LambdaTable
from dode_nodes.tables.free_outputs import FreeOutputs, GaussianPrior
from dode_nodes.tables.provenance import Origin
from tests.hosts.comfy.node_calls import (
    LATENT_SCALE,
    by_the_library,
    empty,
    filled,
    ksampler,
    rms,
    sample_custom,
)

pytestmark = pytest.mark.comfyui


def test_apply_gives_what_the_ksampler_node_gives(make_model, dode):
    model = make_model()
    for solver in ("euler", "heun"):
        table = dode.table(model, solver=solver, steps="8")
        by_model = ksampler(dode.apply(model, table), empty(2), sampler=solver)
        torch.testing.assert_close(by_model, dode.ksampler(model, table, empty(2)))
        assert rms(by_model, ksampler(model, empty(2), sampler=solver)) > 1e-3


def test_apply_leaves_other_runs_alone_and_says_why(make_model, dode, caplog):
    model = make_model()
    patched = dode.apply(model, dode.table(model))
    for changes in ({"sampler": "dpmpp_2m"}, {"steps": 7}, {"scheduler": "simple"}):
        caplog.clear()
        assert torch.equal(ksampler(patched, empty(), **changes), ksampler(model, empty(), **changes))
        assert "λ is not applied" in caplog.text


def test_lambda_is_never_applied_twice(make_model, dode, caplog):
    model = make_model()
    table = dode.table(model)
    patched = dode.apply(model, table)
    once = dode.ksampler(model, table, empty())
    assert torch.equal(dode.ksampler(patched, table, empty()), once)
    torch.testing.assert_close(ksampler(dode.apply(patched, table), empty()), once)
    for row, same in zip(dode.table(patched).rows, table.rows, strict=True):
        assert (row.weights == same.weights).all()
    assert "is ignored" in caplog.text


def test_a_part_where_the_solver_takes_other_steps_is_refused(make_model, dode):
    """heunpp2 looks ahead: stopped early, it asks other σ than over the whole schedule."""
    model = make_model()
    table = dode.table(model, solver="heunpp2", steps="6")
    sigmas = torch.tensor(table.rows[0].sigmas[:4], dtype=torch.float32)
    for on, by in ((dode.apply(model, table), "heunpp2"), (model, dode.sampler(table))):
        with pytest.raises(DodeError, match="cannot stop"):
            sample_custom(on, by, sigmas, empty())


def test_a_run_that_fails_leaves_the_patched_model_clean(make_model, dode):
    model = make_model()
    patched = dode.apply(model, dode.table(model))
    good = ksampler(patched, empty())

    def fail(evaluated: int) -> None:
        raise torch.OutOfMemoryError("no memory")

    model.model.on_call = fail
    with pytest.raises(torch.OutOfMemoryError):
        ksampler(patched, empty())
    model.model.on_call = None
    assert torch.equal(ksampler(patched, empty()), good)


@pytest.mark.parametrize("by", ["sampler", "model"])
@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_a_mask_keeps_what_the_stock_sampler_keeps(kind, by, make_model, dode):
    model = make_model(kind)
    table = dode.table(model, scheduler="simple")
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    latent = filled() | {"noise_mask": mask}
    stock = ksampler(model, latent, scheduler="simple", mask=mask)
    if by == "sampler":
        result = dode.ksampler(model, table, latent)
    else:
        result = ksampler(dode.apply(model, table), latent, scheduler="simple", mask=mask)
    torch.testing.assert_close(result[..., 2:], stock[..., 2:], rtol=1e-4, atol=1e-4)
    assert rms(result[..., :2], stock[..., :2]) > 1e-3


def _wide_row(model, kind: str, steps: int = 4) -> LambdaRow:
    """Bands, a first step that is free, the start and a Gaussian denoiser, with weights near Euler's."""
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    schedules = [comfy.samplers.calculate_sigmas(sampling, "simple", n).numpy() for n in (steps, steps + 1)]
    began, sigmas = (each.astype(float) for each in schedules)
    prior = GaussianPrior(np.zeros(4), np.stack([np.eye(4), 0.3 * np.eye(4)]))
    random = np.random.default_rng(0)
    weights = np.tril(random.normal(0, 0.1, (2, steps + 1, steps + 3)), 2)
    weights[0] += np.eye(steps + 1, steps + 3, 2)
    return LambdaRow(
        "euler", sigmas, (1,) * (steps + 1), weights, form="history", free=FreeOutputs(True, True, prior),
        origin=Origin("refined", "euler", {}, began),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_a_row_with_all_that_costs_nothing_runs_as_in_the_library(kind, make_model, dode):
    """By KSampler (D-ODE), by a sampler and sigmas, and through a patched model; its steps are its evaluations."""
    model = make_model(kind)
    row = _wide_row(model, kind)
    table = LambdaTable([row])
    evaluated = []
    model.model.on_call = evaluated.append
    by_node = dode.ksampler(model, table, empty(3), steps=4)
    model.model.on_call = None
    assert len(evaluated) == 2 * row.nfe or len(evaluated) == row.nfe == 4  # guidance in one batch or in two
    expected = by_the_library(row, kind) / LATENT_SCALE
    torch.testing.assert_close(by_node, expected, rtol=1e-4, atol=1e-4)
    sigmas = dode.sigmas(table, 4)
    assert len(sigmas) == 6
    torch.testing.assert_close(sample_custom(model, dode.sampler(table), sigmas, empty(3)), by_node)
    torch.testing.assert_close(sample_custom(dode.apply(model, table), "euler", sigmas, empty(3)), by_node)


@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_a_part_of_such_a_row_evaluates_the_network_at_every_step(kind, make_model, dode):
    model = make_model(kind)
    row = _wide_row(model, kind)
    table = LambdaTable([row])
    sigmas = dode.sigmas(table, 4, denoise=0.5)
    assert len(sigmas) == 3
    by_node = dode.ksampler(model, table, filled(), steps=4, denoise=0.5)
    by_model = sample_custom(dode.apply(model, table), "euler", sigmas, filled())
    torch.testing.assert_close(by_node, by_model)
