"""ComfyUI's samplers for the library: which can be distilled or teach, and that they can be refined."""

from __future__ import annotations

import pytest
import torch

from dode_nodes import Latents, Teacher, distill, refine, run_teacher
from tests.oracles import two_peaks
from tests.toys import karras, latents

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("pack")]


def test_solver_lists_are_what_the_probe_finds():
    from dode_nodes.hosts.comfy.host_samplers import student_names, teacher_names

    students, teachers = student_names(), teacher_names()
    assert {"euler", "heun", "dpmpp_2m", "ipndm", "deis", "lms", "uni_pc", "dpm_solver_3"} <= set(students)
    assert not {"euler_ancestral", "dpm_adaptive", "euler_cfg_pp", "dpmpp_sde", "lcm"} & set(students)
    assert {"euler", "heun", "dpmpp_2m"} <= set(teachers)
    assert not {"uni_pc", "dpm_fast", "dpm_adaptive", "ipndm_v"} & set(teachers)


@pytest.mark.parametrize("flow", [False, True])
def test_what_stands_behind_a_denoiser_is_the_hosts_own(flow):
    """Else samplers of other packs fail on what is missing, and are never offered."""
    import comfy.model_base
    import comfy.model_sampling
    import comfy.samplers
    from comfy.model_patcher import ModelPatcher

    from dode_nodes.hosts.comfy.host_samplers import what_samplers_look_for

    model = what_samplers_look_for(flow=flow)
    assert isinstance(model, comfy.samplers.KSamplerX0Inpaint)
    assert isinstance(model.inner_model, comfy.samplers.CFGGuider)
    assert isinstance(model.inner_model.model_patcher, ModelPatcher)
    network = model.inner_model.inner_model
    assert isinstance(network, comfy.model_base.BaseModel)
    assert isinstance(network.model_sampling, comfy.model_sampling.CONST) is flow
    assert float(network.model_sampling.sigma_max) == pytest.approx(1.0 if flow else 14.6146, rel=1e-4)
    assert model.inner_model.model_patcher.get_model_object("model_sampling") is network.model_sampling
    assert next(network.parameters(), None) is None


@pytest.mark.parametrize("solver", ["uni_pc", "uni_pc_bh2"])
def test_the_library_refines_solvers_that_need_a_schedule_in_float32(solver):
    sigmas = karras(5).float()
    lot = Latents.of(two_peaks, latents(8).float())
    targets = run_teacher(lot, sigmas, Teacher(scale=4), solvers=solver)
    greedy = distill(targets, sigmas, solver=solver)
    refined = refine(targets, greedy)
    assert refined.sigmas.dtype == "float64"  # as all rows'
    assert refined.is_refined
    assert refined.error_from() < min(greedy.error_from(), greedy.errors.stock)
    assert torch.equal(torch.tensor(refined.sigmas).float()[[0, -1]], sigmas[[0, -1]])
