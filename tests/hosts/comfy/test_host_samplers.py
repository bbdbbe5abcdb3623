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
