"""A stranger's table: what it does to a picture is said by its name, and what it says is text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dode_nodes import LambdaRow, LambdaTable
from dode_nodes.errors import IneligibleSampler, NotFinite
from tests.hosts.comfy.node_calls import empty, ksampler, sample_custom, zero_table

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("pack")]


@pytest.fixture
def bad(make_model, tmp_path):
    """The largest weights that a file may have, over a network that multiplies."""
    model = make_model()
    network = model.model._apply_model
    model.model._apply_model = lambda x, *args, **kwargs: 1e30 * network(x, *args, **kwargs)
    table = zero_table(model, "euler")
    row = dataclasses.replace(table.rows[0], weights=np.full(8, 1e3), solver_options={})
    path = LambdaTable([row], table.model).save(tmp_path / "not mine.safetensors")
    return model, LambdaTable.load(path)


def test_a_latent_that_is_not_finite_names_the_table(bad, dode):
    model, table = bad
    named = rf"from the λ table 'not mine {table.sha256[:8]}' with euler, 8 steps"
    with pytest.raises(NotFinite, match=named):
        dode.ksampler(model, table, empty())
    with pytest.raises(NotFinite, match=named):
        sample_custom(model, dode.sampler(table), dode.sigmas(table, 8), empty())
    with pytest.raises(NotFinite, match=named):
        ksampler(dode.apply(model, table), empty())


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_2m_cfg_pp", "dpm_adaptive", "lcm"])
def test_a_row_for_a_sampler_that_no_row_can_be_of_is_refused_before_the_network_is_asked(
    solver, make_model, dode
):
    model = make_model()
    sigmas = zero_table(model, "euler").rows[0].sigmas
    table = LambdaTable([LambdaRow(solver, sigmas, (1,) * 8, np.zeros(8))])
    with pytest.raises(IneligibleSampler):
        dode.ksampler(model, table, empty())
    with pytest.raises(IneligibleSampler):
        ksampler(dode.apply(model, table), empty(), sampler=solver)
    assert model.model.evaluated == 0
