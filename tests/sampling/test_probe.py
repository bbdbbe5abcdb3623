"""The probe tells which samplers can be distilled or teach, and why not, before any network is asked."""

from __future__ import annotations

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from dode_nodes.errors import DodeError, IneligibleSampler
from dode_nodes.fit.distill import distill
from dode_nodes.fit.latents import Latents
from dode_nodes.fit.teacher import Teacher, run_teacher
from dode_nodes.sampling.probe import (
    asked_sigmas,
    probe_repeatable,
    probe_student,
    probe_teacher,
    solver_name,
)
from dode_nodes.sampling.solvers import SOLVERS, sample_euler, sample_heun
from dode_nodes.tables.gate import is_name
from dode_nodes.tables.row import MAX_EVALUATIONS
from tests.oracles import two_peaks
from tests.toys import (
    Counting,
    catches_everything,
    distilled,
    exponential,
    karras,
    latents,
    uniform,
    writes_into_what_it_is_given,
)

# --- Samplers that cannot be distilled ----------------------------------------------------------------


def steps(sigmas):
    return itertools.pairwise(sigmas)


def seeded_noise(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As ComfyUI's ancestral samplers: the noise follows from extra_args["seed"], call for call the same."""
    generator = torch.Generator().manual_seed(extra_args["seed"])
    for sigma, sigma_next in steps(sigmas):
        denoised = model(x, sigma.expand(len(x)), **extra_args)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = denoised + (x - denoised) / sigma * sigma_next / 2 + noise * sigma_next / 2
    return x


def generator_noise(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As k-diffusion's ancestral samplers: noise from the global generator."""
    for sigma, sigma_next in steps(sigmas):
        denoised = model(x, sigma.expand(len(x)), **extra_args)
        x = denoised + (x - denoised) / sigma * sigma_next / 2 + torch.randn_like(x) * sigma_next / 2
    return x


def adaptive(model, x, sigmas, extra_args=None, callback=None, disable=None):
    sigma, end = sigmas[0], sigmas[-2]
    while sigma > end:
        denoised = model(x, sigma.expand(len(x)), **extra_args)
        sigma_next = torch.maximum(end, sigma * (0.5 + 0.1 * denoised.mean().clamp(-1, 1)))
        x = denoised + (x - denoised) * sigma_next / sigma
        sigma = sigma_next
    return x


def batch_minded(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Asks once more where the batch is larger."""
    for _ in range(len(x)):
        denoised = model(x, sigmas[0].expand(len(x)), **extra_args)
    return denoised


def normalising(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As CFG rescale: the denoised gets the standard deviation of x."""
    for sigma, sigma_next in steps(sigmas):
        denoised = model(x, sigma.expand(len(x)), **extra_args)
        denoised = denoised / denoised.std() * (1 + x.std() / 10)
        x = denoised + (x - denoised) * sigma_next / sigma
    return x


def thresholding(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As Imagen's: the denoised is clipped, here at the last evaluation only."""
    for sigma, sigma_next in steps(sigmas):
        denoised = model(x, sigma.expand(len(x)), **extra_args)
        denoised = denoised.clamp(-1, 1) if sigma_next == 0 else denoised
        x = denoised + (x - denoised) * sigma_next / sigma
    return x


def cfg_plus_plus(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As ComfyUI's *_cfg_pp samplers: reads the unconditional prediction through a hook."""
    seen = {}
    options = extra_args["model_options"].copy()
    options["sampler_post_cfg_function"] = [lambda args: seen.update(args) or args["denoised"]]
    for sigma, sigma_next in steps(sigmas):
        denoised = model(x, sigma.expand(len(x)), **extra_args | {"model_options": options})
        x = denoised + (x - seen["uncond_denoised"]) / sigma * sigma_next
    return x


def reads_the_model(model, x, sigmas, extra_args=None, callback=None, disable=None):
    denoised = model(x, sigmas[0].expand(len(x)), **extra_args)
    return denoised + model.last_uncond


def dpm_fast_like(model, x, sigma_min, sigma_max, n, extra_args=None, callback=None, disable=None):
    return x


def endless(model, x, sigmas, extra_args=None, callback=None, disable=None):
    while True:
        x = model(x, sigmas[0].expand(len(x)), **extra_args)


def asks_zero(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for sigma in sigmas:
        x = model(x, sigma.expand(len(x)), **extra_args)
    return x


def asks_above(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return model(x, 1.1 * sigmas[0].expand(len(x)), **extra_args)


def asks_nothing(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return x * 0


def not_a_number(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return model(x, sigmas[0].expand(len(x)), **extra_args) * math.nan


def returns_a_pair(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return model(x, sigmas[0].expand(len(x)), **extra_args), {"steps": 1}


INELIGIBLE = {
    seeded_noise: "'seeded_noise' is stochastic: its result changes with the seed",
    generator_noise: "'generator_noise' is stochastic",
    adaptive: "'adaptive' is adaptive: it chooses its σ during the run",
    batch_minded: "'batch_minded' is adaptive",
    normalising: r"'normalising' is not affine in the denoised latent \(at network evaluation 1\)",
    thresholding: r"'thresholding' is not affine in the denoised latent \(at network evaluation 5\)",
    cfg_plus_plus: "'cfg_plus_plus' uses more than the denoised latent: it changes the model's guidance",
    reads_the_model: "'reads_the_model' fails on this schedule, or uses more than the denoised latent .*last_uncond",
    dpm_fast_like: r"'dpm_fast_like' cannot be called as \(model, x, sigmas, …\)",
    endless: "'endless' does not stop: it evaluated the network 300 times",
    asks_zero: "'asks_zero' evaluates the network at σ = 0",
    asks_above: "'asks_above' evaluates the network at σ = 16.06, above the schedule",
    asks_nothing: "'asks_nothing' never evaluates the network",
    not_a_number: "'not_a_number' returns NaN or infinite values",
    returns_a_pair: "'returns_a_pair' does not return the latent",
}


NO_TEACHERS_EITHER = [sampler for sampler in INELIGIBLE if sampler not in (normalising, thresholding)]


@pytest.mark.parametrize("sampler", INELIGIBLE, ids=lambda sampler: sampler.__name__)
def test_ineligible_sampler_is_refused_before_any_network_evaluation(sampler):
    model = Counting()
    of = Latents.of(model, latents(2))
    targets = run_teacher(of, karras(5))
    spent = model.evaluations
    for refused in (
        lambda: distill(targets, karras(5), solver=sampler),
        lambda: run_teacher(of, karras(5), solvers=sampler),
    ):
        with pytest.raises(IneligibleSampler, match=INELIGIBLE[sampler]):
            refused()
    assert model.evaluations == spent


@pytest.mark.parametrize("sampler", NO_TEACHERS_EITHER, ids=lambda f: f.__name__)
def test_ineligible_teacher_is_refused_before_any_network_evaluation(sampler):
    model = Counting()
    with pytest.raises(IneligibleSampler, match=INELIGIBLE[sampler].split("(at")[0].replace("300", r"\d+")):
        run_teacher(Latents.of(model, latents(2)), karras(5), Teacher(sampler))
    assert model.evaluations == 0


def test_options_that_a_sampler_lacks_are_named():
    with pytest.raises(
        IneligibleSampler, match=r"'euler' cannot be called .* with these options: .*max_order"
    ):
        probe_student(sample_euler, karras(5), options={"max_order": 2})
    assert probe_student(SOLVERS["ipndm"], karras(5), options={"max_order": 2}).per_step == (1,) * 5


def test_error_of_a_sampler_keeps_its_cause():
    def broken(model, x, sigmas, extra_args=None, callback=None, disable=None):
        raise RuntimeError("out of luck")

    with pytest.raises(IneligibleSampler, match="RuntimeError: out of luck") as caught:
        probe_student(broken, karras(5))
    assert isinstance(caught.value.__cause__, RuntimeError)


# --- Samplers that can --------------------------------------------------------------------------------


def noise_never_used(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As ComfyUI's heunpp2 and dpm_fast: draws noise, at a weight of 0."""
    for sigma, sigma_next in steps(sigmas):
        noise = torch.randn_like(x)
        denoised = model(x, sigma.expand(len(x)), **extra_args)
        x = denoised + (x - denoised) * sigma_next / sigma + 0 * noise
    return x


def float32_only(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As ComfyUI's uni_pc, which solves a float32 system."""
    for sigma, sigma_next in steps(sigmas):
        denoised = model(x, sigma.expand(len(x)), **extra_args)
        weight = torch.tensor([[1.0]]) @ (sigma_next / sigma).reshape(1, 1)
        x = denoised + (x - denoised) * weight
    return x


@pytest.mark.parametrize("sampler", [noise_never_used, writes_into_what_it_is_given, catches_everything])
def test_harmless_oddities_are_eligible(sampler):
    assert probe_student(sampler, karras(5)).per_step == (1,) * 5
    assert probe_teacher(sampler, karras(5)).starts == (0, 1, 2, 3, 4)


def test_sampler_runs_in_the_precision_of_its_schedule():
    assert probe_student(float32_only, karras(5).float()).per_step == (1,) * 5
    with pytest.raises(IneligibleSampler, match="dtype"):
        probe_student(float32_only, karras(5))


PER_STEP = {
    "euler": [1, 1, 1, 1, 1, 1, 1],
    "heun": [2, 2, 2, 2, 2, 2, 1],
    "dpm_2": [2, 2, 2, 2, 2, 2, 1],
    "dpm_solver_3": [3, 0, 0, 3, 0, 0, 1],
    "dpmpp_2m": [1, 1, 1, 1, 1, 1, 1],
    "dpmpp_3m": [1, 1, 1, 1, 1, 1, 1],
    "ipndm": [1, 1, 1, 1, 1, 1, 1],
    "deis": [1, 1, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", [karras, uniform, exponential])
@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_per_step(name, schedule, dtype):
    """On an exponential schedule, too, where the inner stages of DPM-Solver-3 fall on its σ."""
    sigmas, model = schedule(7).to(dtype), Counting()
    queries = probe_student(SOLVERS[name], sigmas)
    assert list(queries.per_step) == PER_STEP[name]
    SOLVERS[name](model, latents(1, sigma=1.0).to(dtype), sigmas, disable=True)
    assert list(queries.sigmas) == model.sigmas == asked_sigmas(SOLVERS[name], sigmas)


def test_one_step_is_enough():
    queries = probe_student(sample_heun, karras(1))
    assert (queries.sigmas, queries.per_step) == ((karras(1)[0].item(),), (1,))


def switches_below_one(model, x, sigmas, **kwargs):
    """Heun above σ = 1, Euler below."""
    high = int((sigmas > 1).sum())
    x = sample_heun(model, x, sigmas[: high + 1], **kwargs)
    return sample_euler(model, x, sigmas[high:], **kwargs)


def test_sampler_with_a_threshold_of_its_own():
    """The schedule is moved a little to tell stages from steps: here that moves a σ over the threshold."""
    sigmas = torch.tensor([9.0, 4.0, 1.001, 0.3, 0.0])
    assert probe_student(switches_below_one, sigmas).per_step == (2, 2, 2, 1)


def test_sampler_that_fails_on_short_schedules():
    def needs_three(model, x, sigmas, **kwargs):
        if len(sigmas) < 4:
            raise ValueError("too few")
        return sample_euler(model, x, sigmas, **kwargs)

    assert probe_student(needs_three, karras(5)).per_step == (1, 1, 3, 0, 0)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    probe_student(noise_never_used, karras(5))
    probe_teacher(noise_never_used, karras(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_state_of_the_gpu_is_not_seeded(monkeypatch):
    def seeded(*_):
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    monkeypatch.setattr(torch, "manual_seed", seeded)
    probe_student(noise_never_used, karras(5))


def test_only_attributes_of_the_model_are_used():
    model = Counting()

    def asks_behind_the_call(denoiser, x, sigmas, **kwargs):
        assert denoiser.inner_model is model.inner_model
        return sample_euler(denoiser, x, sigmas, **kwargs)

    probe_student(asks_behind_the_call, karras(5), model=model)
    probe_teacher(asks_behind_the_call, karras(5), model=model)
    assert model.evaluations == 0


def test_names():
    assert solver_name("euler") == "euler"
    assert solver_name(sample_heun) == "<heun>"
    assert solver_name(functools.partial(sample_heun)) == "<partial>"
    assert solver_name(lambda: None) == "<lambda>"


@pytest.mark.parametrize("called", ["my sampler (2)", "9th", "<img src=x>", "", "λ", "x" * 500])
def test_a_row_accepts_whatever_a_function_is_called(called):
    def sampler(): ...

    sampler.__name__ = called
    assert is_name(solver_name(sampler))


def test_more_steps_than_a_row_holds_are_refused():
    def skips_most(model, x, sigmas, **kwargs):
        return sample_euler(model, x, sigmas[[0, -1]], **kwargs)

    assert sum(probe_student(skips_most, karras(MAX_EVALUATIONS)).per_step) == 1
    with pytest.raises(IneligibleSampler, match="takes 257 steps; at most 256 can be distilled"):
        probe_student(skips_most, karras(MAX_EVALUATIONS + 1))


# --- Teachers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"dpm_solver_3"}))
@pytest.mark.parametrize("schedule", [karras, uniform, exponential])
def test_states_of_a_teacher_are_what_a_prefix_returns(name, schedule):
    sigmas = schedule(6)
    queries = probe_teacher(SOLVERS[name], sigmas)
    x, asked = latents(1, sigma=float(sigmas[0])), []

    def model(x, sigma):
        asked.append(x)
        return two_peaks(x, sigma)

    SOLVERS[name](model, x, sigmas, disable=True)
    assert queries.evaluations == len(asked)
    for i, start in enumerate(queries.starts):
        prefix = SOLVERS[name](two_peaks, x, sigmas[: i + 1], disable=True)
        torch.testing.assert_close(asked[start], prefix, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "grid",
    [karras(12), exponential(12), Teacher(scale=3).grid([karras(4).tolist()], [karras(4)])],
    ids=["karras", "exponential", "refined"],
)
def test_teacher_that_steps_over_sigmas_is_refused(grid):
    """Though on an exponential grid it asks all of them: in stages, which are no states."""
    with pytest.raises(IneligibleSampler, match="does not evaluate the network at every σ of its schedule"):
        probe_teacher(SOLVERS["dpm_solver_3"], grid)


def test_teacher_that_ends_elsewhere_is_refused():
    def ends_early(model, x, sigmas, **kwargs):
        sigmas[-1] = 0.001
        return sample_euler(model, x, sigmas, **kwargs)

    with pytest.raises(IneligibleSampler, match="does not end at the last σ of its schedule"):
        probe_teacher(ends_early, karras(20))


def test_teacher_that_asks_about_other_states_is_refused():
    def in_other_units(model, x, sigmas, **kwargs):
        return sample_euler(lambda x, sigma, **args: model(x / 2, sigma, **args), x, sigmas, **kwargs)

    with pytest.raises(
        IneligibleSampler, match="far from the exact solution, even if the denoised latent is"
    ):
        probe_teacher(in_other_units, karras(20))


def test_non_affine_teacher_may_teach():
    def curved(model, x, sigmas, **kwargs):
        def denoise(x, sigma, **args):
            denoised = model(x, sigma, **args)
            return denoised + 0.01 * (denoised - denoised.mean()) ** 2

        return sample_euler(denoise, x, sigmas, **kwargs)

    with pytest.raises(IneligibleSampler, match="not affine"):
        probe_student(curved, karras(5))
    assert probe_teacher(curved, karras(5)).starts == (0, 1, 2, 3, 4)


# --- ComfyUI's ----------------------------------------------------------------------------------------

STUDENTS = {
    "euler": (1, 1, 1, 1, 1),
    "ddim": (1, 1, 1, 1, 1),
    "heun": (2, 2, 2, 2, 1),
    "heunpp2": (3, 3, 3, 2, 1),
    "dpm_2": (2, 2, 2, 2, 1),
    "lms": (1, 1, 1, 1, 1),
    "dpm_fast": (5, 0, 0, 0, 0),
    "dpmpp_2m": (1, 1, 1, 1, 1),
    "ipndm": (1, 1, 1, 1, 1),
    "ipndm_v": (1, 1, 1, 1, 1),
    "deis": (1, 1, 1, 1, 1),
    "res_multistep": (1, 1, 1, 1, 1),
    "gradient_estimation": (1, 1, 1, 1, 1),
    "uni_pc": (1, 1, 1, 1, 1),
    "uni_pc_bh2": (1, 1, 1, 1, 1),
}
"""Those of ComfyUI 0.3.64 that can be distilled, and their evaluations of five steps."""

NO_TEACHERS = {
    "dpm_fast": "does not evaluate the network at every σ",
    "uni_pc": "does not end at the last σ",
    "uni_pc_bh2": "does not end at the last σ",
    "ipndm_v": "far from the exact solution",  # its weights of order 4 do not sum to 1 on unequal steps
}


@pytest.fixture(scope="session")
def behind_the_denoiser(comfyui):
    """What ComfyUI's samplers read behind the call: the model's noise schedule."""

    class ModelSampling(comfyui.model_sampling.ModelSamplingDiscrete, comfyui.model_sampling.EPS):
        pass

    sampling = ModelSampling()
    patcher = SimpleNamespace(get_model_object=lambda name: sampling)
    guider = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling), model_patcher=patcher)
    return SimpleNamespace(inner_model=guider)


@pytest.fixture(scope="session")
def comfy_sampler(comfyui):
    return lambda name: comfyui.samplers.sampler_object(name).sampler_function


SCHEDULE = karras(5).float()
GRID = Teacher().grid([SCHEDULE[:-1].tolist()], [SCHEDULE]).float()


@pytest.mark.comfyui
def test_which_of_comfyuis_samplers_are_eligible(comfyui, comfy_sampler, behind_the_denoiser):
    names = comfyui.samplers.SAMPLER_NAMES
    assert set(names) == {*comfyui.samplers.KSAMPLER_NAMES, "ddim", "uni_pc", "uni_pc_bh2"}
    found, reasons = {}, {}
    for name in names:
        try:
            found[name] = probe_student(comfy_sampler(name), SCHEDULE, model=behind_the_denoiser).per_step
        except IneligibleSampler as error:
            reasons[name] = str(error)
    assert found == STUDENTS
    for name, reason in reasons.items():
        if name.endswith("cfg_pp"):
            assert "it changes the model's guidance" in reason
        elif name == "dpm_adaptive":
            assert "is adaptive" in reason
        else:
            assert "is stochastic" in reason


@pytest.mark.comfyui
@pytest.mark.parametrize("name", STUDENTS)
def test_which_of_comfyuis_samplers_can_teach(comfy_sampler, behind_the_denoiser, name):
    if name in NO_TEACHERS:
        with pytest.raises(IneligibleSampler, match=NO_TEACHERS[name]):
            probe_teacher(comfy_sampler(name), GRID, model=behind_the_denoiser)
    else:
        queries = probe_teacher(comfy_sampler(name), GRID, model=behind_the_denoiser)
        assert len(queries.starts) == len(GRID) - 1


@pytest.mark.comfyui
@pytest.mark.parametrize("name", STUDENTS)
def test_comfyuis_eligible_samplers_distil(comfy_sampler, behind_the_denoiser, name):
    model = Counting()
    model.inner_model = behind_the_denoiser.inner_model

    def comfy_teacher(*args, **kwargs):
        return comfy_sampler("dpmpp_2m")(*args, **kwargs)

    of = Latents.of(model, latents(8).float())
    row = distilled(of, SCHEDULE, solver=comfy_sampler(name), teacher=Teacher(comfy_teacher))
    assert row.evaluations == STUDENTS[name]
    assert sum(row.report["evaluations"].values()) == model.evaluations
    assert row.errors.dode[0] <= row.errors.stock


@pytest.mark.comfyui
@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive", "uni_pc", "euler_ancestral"])
def test_comfyuis_unfit_teachers_are_refused_before_any_network_evaluation(
    comfy_sampler, behind_the_denoiser, name
):
    model = Counting()
    model.inner_model = behind_the_denoiser.inner_model
    with pytest.raises(DodeError, match=r"cannot be the teacher|is adaptive|is stochastic"):
        run_teacher(Latents.of(model, latents(2).float()), SCHEDULE, Teacher(comfy_sampler(name)))
    assert model.evaluations == 0


# --- What samplers keep in model_options --------------------------------------------------------------


def keeping(put):
    """Euler's method that first puts something into its model_options."""

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        put(extra_args["model_options"])
        return sample_euler(model, x, sigmas, extra_args, callback, disable)

    return sample


@pytest.mark.parametrize(
    "put",
    [
        lambda options: options["transformer_options"].update(row=0, patches={"attn1": [print]}),
        lambda options: options.update(mypack={"step": 0}, another=[1, "two"], third=torch.ones(2)),
        lambda options: options.setdefault("transformer_options", {}).setdefault("sample_sigmas", [1.0]),
    ],
)
def test_notes_of_a_sampler_do_no_harm(put):
    assert probe_student(keeping(put), karras(4)) == probe_student(sample_euler, karras(4))


@pytest.mark.parametrize(
    "put",
    [
        lambda options: options.update(sampler_post_cfg_function=[print], disable_cfg1_optimization=True),
        lambda options: options.update(sampler_cfg_function=print),
        lambda options: options.update(model_function_wrapper=lambda *args: args),
    ],
)
def test_functions_in_them_are_hooks_on_the_guidance(put):
    with pytest.raises(IneligibleSampler, match="it changes the model's guidance"):
        probe_student(keeping(put), karras(4))


def test_the_least_is_asked_by_two_runs():
    """For a list; what else a student must be is found when it is chosen."""
    evaluations = 0

    def counted(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def counting(x, sigma, **extra_args):
            nonlocal evaluations
            evaluations += 1
            return model(x, sigma, **extra_args)

        return sample_euler(counting, x, sigmas, extra_args, callback, disable)

    probe_repeatable(counted, karras(3))
    assert evaluations == 2 * 3
    for stochastic in (seeded_noise, generator_noise):
        with pytest.raises(IneligibleSampler, match="is stochastic"):
            probe_repeatable(stochastic, karras(2))
    with pytest.raises(IneligibleSampler, match="it changes the model's guidance"):
        probe_repeatable(cfg_plus_plus, karras(2))
    probe_repeatable(adaptive, karras(4))
