"""The scheduler in real pipelines: equal to diffusers' own where the numbers are theirs, and to ``sample_dode``."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dode_nodes import DodeError, LambdaRow, LambdaTable, sample_dode
from dode_nodes.hosts.diffusers import DODEScheduler
from dode_nodes.hosts.diffusers.host_schedule import HostSchedule
from dode_nodes.hosts.diffusers.model_facts import model_facts
from dode_nodes.sampling.multistep import as_history
from dode_nodes.sampling.solvers import SOLVERS
from dode_nodes.tables.free_outputs import FreeOutputs, GaussianPrior
from dode_nodes.tables.provenance import HeldOutErrors, Origin
from tests.hosts.diffusers.tiny_pipelines import CFG, SIZE, arguments_of, call, error, noise, plain_euler

ALL = ("sd", "sd, v", "sd, x0", "sd img2img", "sd inpaint", "sdxl", "sd3", "flux", "wan")
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
MASK = torch.zeros(1, 1, SIZE, SIZE)
MASK[..., SIZE // 2 :] = 1
PARTS = {"sd img2img": {"strength": 0.6}, "sd inpaint": {"strength": 1.0, "mask_image": MASK}}


def seeded(**more: Any) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(3)} | more


def row_of(sigmas, weights=None, **facts) -> LambdaRow:
    """Of euler; by default, of weights that change nothing."""
    n = len(sigmas) - 1
    weights = np.eye(n) if weights is None else weights
    form = "history" if np.ndim(weights) > 1 else "lambda"
    return LambdaRow(**{"solver": "euler", "sigmas": np.array(sigmas, dtype=float), "evaluations": (1,) * n,
                        "weights": weights, "form": form} | facts)  # fmt: skip


def with_rows(pipe: Any, *rows: LambdaRow, **how: Any) -> Any:
    pipe.scheduler = DODEScheduler.from_table(LambdaTable(rows), pipe.scheduler.config, **how)
    return pipe


def karras(steps: int) -> np.ndarray:
    ramp = np.linspace(14.6 ** (1 / 7), 0.05 ** (1 / 7), steps) ** 7
    return np.append(ramp, 0)


def remarks(do: Callable[[], object]) -> list[str]:
    """Ours, while something is done."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        do()
    return [str(each.message) for each in said if each.category is UserWarning]


# --- Equalities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("table", [True, False], ids=["identity weights", "no table"])
@pytest.mark.filterwarnings("ignore:this runs plain Euler")
def test_without_a_correction_it_is_euler(pipeline, name, table):
    pipe, how = pipeline(name), PARTS.get(name, {})
    pipe.scheduler = plain_euler(pipe)
    config = pipe.scheduler.config
    expected = call(pipe, 6, **seeded(**how))
    if table:
        with_rows(pipe, row_of(pipe.scheduler.sigmas.tolist()))
    else:
        pipe.scheduler = DODEScheduler.from_config(config)
    most = 1e-4 if name == "sd, x0" else 8e-6  # that network magnifies what was rounded
    assert error(call(pipe, 6, **seeded(**how)), expected) <= (0 if HostSchedule(config).flow else most)


@pytest.mark.filterwarnings("ignore:this runs plain Euler")
def test_a_flow_config_of_another_scheduler(pipeline):
    """UniPC's, as Wan has it."""
    pipe = pipeline("wan")
    assert pipe.scheduler.config.flow_shift == 3
    theirs = FLOW(shift=3.0)
    theirs.set_timesteps(5)
    plain = DODEScheduler.from_config(pipe.scheduler.config)
    with_rows(pipe, row_of(theirs.sigmas.tolist()))
    got = call(pipe, 5)
    for other in (theirs, plain):
        pipe.scheduler = other
        assert torch.equal(got, call(pipe, 5))


@pytest.mark.parametrize("name", ["sd", "sd, v"])
def test_weights_of_dpmpp_2m_are_diffusers_multistep_solver(pipeline, name):
    pipe = pipeline(name)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="linspace"
    )
    begun = noise(pipe)
    expected = call(pipe, 6, latents=begun)
    sigmas = pipe.scheduler.sigmas.double().numpy()
    weights = as_history(SOLVERS["dpmpp_2m"], sigmas, np.zeros((6, 6)), "noise")
    with_rows(pipe, row_of(sigmas, weights))
    scale = math.hypot(1, sigmas[0]) / sigmas[0]  # theirs begins with noise of variance 1 at any σ
    assert error(call(pipe, 6, latents=begun * scale), expected) < 5e-6


def test_heun_is_diffusers_heun(pipeline):
    pipe = pipeline("sd")
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    expected = call(pipe, 5)
    sigmas = pipe.scheduler.sigmas[[0, 1, 3, 5, 7, 9]].tolist()
    row = row_of(sigmas, np.zeros(9), solver="heun", evaluations=(2, 2, 2, 2, 1))
    with_rows(pipe, row)
    assert error(call(pipe, 5), expected) < 2e-5
    assert len(pipe.scheduler.timesteps) == 9
    assert pipe.scheduler.order == 2


def denoiser_of(pipe: Any, batch: int = 2):
    """The pipeline's network under its guidance, in k-diffusion's convention."""
    arguments, host = arguments_of(pipe, batch), HostSchedule(pipe.scheduler.config)
    text = torch.cat([arguments["negative_prompt_embeds"], arguments["prompt_embeds"]])

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        at = float(sigma[0])
        both = torch.cat([host.model_input(x, at)] * 2)
        t = host.timesteps([at])
        if host.flow:
            pooled = [arguments[f"{which}pooled_prompt_embeds"] for which in ("negative_", "")]
            output = pipe.transformer(both, text, torch.cat(pooled), t.expand(len(both)), return_dict=False)[
                0
            ]
        else:
            output = pipe.unet(both, t[0], encoder_hidden_states=text, return_dict=False)[0]
        unguided, guided = output.chunk(2)
        return x - at * host.noise(x, at, unguided + CFG * (guided - unguided))

    return model


RNG = np.random.default_rng(0)
PRIOR = GaussianPrior(np.full(4, 0.3), np.linspace(2, 0.1, 5)[:, None, None] * (np.eye(4) + 0.2))


def wide_row(sigmas, planes=2, **free) -> LambdaRow:
    """Weights of all kinds, no two alike."""
    outputs = FreeOutputs(**free)
    n, columns = len(sigmas) - 1, outputs.columns
    weights = 0.2 * RNG.normal(size=(planes, n, columns + n))
    weights[0, :, columns:] += np.eye(n)
    began = np.append(np.geomspace(sigmas[0], sigmas[-2], n - outputs.first), 0)
    origin = Origin("refined", "euler", {}, began) if outputs.first else Origin()
    return row_of(sigmas, np.tril(weights, columns), free=outputs, origin=origin)


SIX, SEVEN = RNG.normal(size=6) * 0.4, RNG.normal(size=7) * 0.3
EPS_ROWS = {
    "λ of noise": row_of(karras(6), SIX),
    "λ of data": row_of(karras(6), SIX, prediction="data"),
    "λ of dpmpp_2m": row_of(karras(6), SIX, solver="dpmpp_2m"),
    "λ of ipndm, order 2": row_of(karras(6), SIX, solver="ipndm", solver_options={"max_order": 2}),
    "λ of heun": row_of(karras(4), SEVEN, solver="heun", evaluations=(2, 2, 2, 1)),
    "λ of dpm_2": row_of(karras(4), SEVEN, solver="dpm_2", evaluations=(2, 2, 2, 1)),
    "history": wide_row(karras(6), planes=1),
    "bands": wide_row(karras(6)),
    "x_T": wide_row(karras(6), start=True),
    "Gaussian denoiser": wide_row(karras(6), gaussian=PRIOR),
    "afs": wide_row(karras(6), planes=1, first=True),
    "afs, bands, x_T and Gaussian": wide_row(karras(6), first=True, start=True, gaussian=PRIOR),
}  # fmt: skip
FLOW_SIGMAS = np.append(np.linspace(1, 0.1, 6), 0)
FLOW_ROWS = {
    "λ": row_of(FLOW_SIGMAS, SIX),
    "λ of dpmpp_2m": row_of(FLOW_SIGMAS, SIX, solver="dpmpp_2m"),
    "bands, x_T and Gaussian": wide_row(FLOW_SIGMAS, start=True, gaussian=PRIOR),
    "afs": wide_row(FLOW_SIGMAS, planes=1, first=True, start=True),
    "afs, bands and Gaussian": wide_row(FLOW_SIGMAS, first=True, gaussian=PRIOR),
}


@pytest.mark.filterwarnings("ignore:.*here its first step is not free")
@pytest.mark.parametrize(("name", "row"), [
    *(pytest.param("sd", row, id=f"sd: {name}") for name, row in EPS_ROWS.items()),
    pytest.param("sd, v", EPS_ROWS["afs, bands, x_T and Gaussian"], id="v: afs, bands, x_T and Gaussian"),
    *(pytest.param("sd3", row, id=f"sd3: {name}") for name, row in FLOW_ROWS.items()),
])  # fmt: skip
def test_a_row_is_what_sample_dode_makes_of_it(pipeline, name, row):
    pipe = with_rows(pipeline(name), row)
    model = denoiser_of(pipe)
    scale = float(row.sigmas[0]) if name != "sd3" else 1.0
    with torch.no_grad():
        expected = sample_dode(model, noise(pipe) * scale, row.sigmas, row=row, disable=True)
        plain = sample_dode(model, noise(pipe) * scale, row.sigmas, solver="euler", disable=True)
    got = call(pipe, row.paid_steps)
    assert error(got, expected) < 8e-6
    assert error(plain, expected) > 1e-3  # the weights matter
    wasted = row.free.first and name == "sd3"
    assert len(pipe.scheduler.timesteps) == row.nfe + wasted


# --- Parts of a row -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["λ of noise", "λ of dpmpp_2m", "λ of heun", "afs, bands, x_T and Gaussian"])
def test_img2img_runs_the_last_steps(pipeline, kind):
    pipe, row = pipeline("sd img2img"), EPS_ROWS[kind]
    started: list[torch.Tensor] = []
    with_rows(pipe, row)
    steps = row.paid_steps
    add_noise = pipe.scheduler.add_noise
    pipe.scheduler.add_noise = lambda *args: started.append(add_noise(*args)) or started[0]
    got = call(pipe, steps, **seeded(strength=0.5))
    begin = row.steps - steps // 2
    with torch.no_grad():
        expected = sample_dode(denoiser_of(pipe), started[0], row.sigmas[begin:], row=row, disable=True)
    assert error(got, expected) < 2e-5


def test_a_run_may_be_shared_between_base_and_refiner(pipeline):
    row = row_of(karras(6), SIX)
    base, refiner = with_rows(pipeline("sdxl"), row), with_rows(pipeline("sdxl img2img"), row)
    t = base.scheduler
    t.set_timesteps(6)
    cut = 1 - float(t.timesteps[2] + t.timesteps[1]) / 2000
    first = call(base, 6, denoising_end=cut)
    whole: list[torch.Tensor] = []
    call(base, 6, callback_on_step_end=lambda pipe, i, t, kept: whole.append(kept["latents"]) or {})
    assert error(first, whole[1]) == 0  # two of the steps
    refined = call(refiner, 6, image=first, denoising_start=cut)
    with_rows(base, row_of(row.sigmas[2:], SIX[2:]))
    alone = call(base, 4, latents=first / float(row.sigmas[2]))
    assert error(refined, alone) < 2e-5


def test_a_row_of_two_stages_does_not_begin_within_a_step(pipeline):
    scheduler = with_rows(pipeline("sd"), EPS_ROWS["λ of heun"]).scheduler
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    with pytest.raises(DodeError, match="cannot begin within a step"):
        scheduler.scale_model_input(torch.zeros(1, 4, 8, 8), scheduler.timesteps[1])


def test_img2img_of_more_steps_than_there_are_says_what_to_set(pipeline):
    pipe = with_rows(pipeline("sd img2img"), row_of(karras(6)))
    with pytest.warns(UserWarning, match="6 steps are run"):  # noqa: SIM117
        with pytest.raises(DodeError, match="set num_inference_steps to 6"):
            call(pipe, 20, strength=0.5)


# --- Which row ----------------------------------------------------------------------------------------


def counted(*steps: int) -> list[LambdaRow]:
    return [row_of(karras(n)) for n in steps]


@pytest.mark.parametrize(("asked", "run"), [(4, 4), (5, 6), (7, 6), (8, 9), (50, 9), (1, 4)])
def test_the_row_of_the_nearest_number_of_steps(pipeline, asked, run):
    scheduler = with_rows(pipeline("sd"), *counted(4, 6, 9)).scheduler
    said = remarks(lambda: [scheduler.set_timesteps(asked) for _ in range(2)])
    assert len(scheduler.timesteps) == run
    text = f"{run} steps are run, not {asked}: this table has 4, 6 and 9 steps"
    assert said == ([] if asked == run else [text])


def test_strict_takes_no_other_row(pipeline):
    scheduler = with_rows(pipeline("sd"), *counted(4, 6), strict=True).scheduler
    scheduler.set_timesteps(6)
    with pytest.raises(DodeError, match="another number of steps than 5: this table has 4 and 6 steps"):
        scheduler.set_timesteps(5)


def test_of_several_rows_the_one_with_the_smallest_error(pipeline):
    errors = [HeldOutErrors(4, (value, *[None] * 5)) for value in (0.3, 0.1, 0.2)]
    rows = [row_of(karras(6) * (1 + 0.01 * i), errors=each) for i, each in enumerate(errors)]
    scheduler = with_rows(pipeline("sd"), *rows).scheduler
    scheduler.set_timesteps(6)
    assert float(scheduler.sigmas[0]) == pytest.approx(rows[1].sigmas[0])


@pytest.mark.parametrize(("row", "why"), [
    (row_of(FLOW_SIGMAS), "for a flow model"),
    (row_of(karras(6), np.zeros(6), solver="<mine>"), "give your own sampler function"),
    (row_of(karras(6), np.zeros(6), solver="nobodys"), "no solver is called 'nobodys'"),
])  # fmt: skip
def test_without_a_row_that_fits_it_is_euler_and_says_so_once(pipeline, row, why):
    pipe = pipeline("sd")
    expected = call(pipe, 6)
    with_rows(pipe, row)
    got: list[torch.Tensor] = []
    (said,) = remarks(lambda: [got.append(call(pipe, steps)) for steps in (6, 5)])
    assert said.startswith("this runs plain Euler: ")
    assert why in said
    assert error(got[0], expected) < 1e-5


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_a_first_step_that_is_free_costs_a_flow_pipeline_an_evaluation_that_changes_nothing(pipeline, name):
    """Whose answer does not matter."""
    row = wide_row(FLOW_SIGMAS, 1, first=True, start=True)
    pipe = with_rows(pipeline(name), row)
    (said,) = remarks(lambda: [call(pipe, 5) for _ in range(2)])
    assert "here its first step is not free" in said
    assert "6 evaluations" in said
    expected, asked = call(pipe, 5), []

    class FirstAnswerIsLost(type(pipe.transformer)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            (output,) = super().forward(*args, **kwargs)
            asked.append(output)
            return (output * (len(asked) > per_evaluation),)

    per_evaluation = 2 if name == "wan" else 1  # which guides in two calls
    pipe.transformer = copy.copy(pipe.transformer)
    pipe.transformer.__class__ = FirstAnswerIsLost
    assert torch.equal(call(pipe, 5), expected)
    assert len(asked) == 6 * per_evaluation


def test_img2img_of_a_flow_row_whose_first_step_is_free(pipeline):
    """A part does not have that step, and begins where it says."""
    row = FLOW_ROWS["afs"]
    scheduler = with_rows(pipeline("sd3"), row).scheduler
    with pytest.warns(UserWarning, match="not free"):
        scheduler.set_timesteps(5)
    x = torch.randn(1, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def network(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x - sigma.reshape(-1, 1, 1, 1) * torch.tanh(x + sigma.reshape(-1, 1, 1, 1))

    for begin in (0, 1, 3):
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(begin)
        state = x
        for t in scheduler.timesteps[begin:]:
            state = scheduler.step(torch.tanh(state + t / 1000), t, state).prev_sample
        assert error(state, sample_dode(network, x, row.sigmas[begin:], row=row, disable=True)) < 1e-5


@pytest.mark.parametrize(
    ("free", "planes", "what"),
    [({}, 2, "weights per band"), ({"gaussian": PRIOR}, 1, "a Gaussian denoiser")],
)
def test_packed_latents_refuse_what_needs_neighbours(pipeline, free, planes, what):
    pipe = with_rows(pipeline("flux"), wide_row(FLOW_SIGMAS, planes, **free))
    with pytest.raises(DodeError, match=f"{what}.* packed"):
        call(pipe, 6)


def test_packed_latents_know_their_start(pipeline):
    pipe = pipeline("flux")
    begun = noise(pipe)
    row = wide_row(FLOW_SIGMAS, 1, start=True)
    with_rows(pipe, row)
    flat = row_of(FLOW_SIGMAS)
    got, plain = call(pipe, 6, latents=begun), call(with_rows(pipe, flat), 6, latents=begun)
    assert error(got, plain) > 1e-3


def test_a_gaussian_denoiser_of_other_channels_is_refused(pipeline):
    prior = GaussianPrior(np.zeros(3), np.ones((2, 1, 1)) * np.eye(3))
    pipe = with_rows(pipeline("sd"), wide_row(karras(6), 1, gaussian=prior))
    with pytest.raises(DodeError, match="latents of 3 channels; these have 4"):
        call(pipe, 6)


def test_a_table_for_another_prediction_is_refused(pipeline):
    table = LambdaTable([row_of(karras(6))], model={"prediction_type": "v"})
    with pytest.raises(DodeError, match="prediction type is 'v', this pipeline's is 'eps'"):
        DODEScheduler.from_table(table, pipeline("sd").scheduler.config)
    DODEScheduler.from_table(table, pipeline("sd, v").scheduler.config)


@pytest.mark.parametrize("config", [{"prediction_type": "v_diffusion"}, {"sigma_data": 0.5}])
def test_networks_of_other_kinds_are_refused(config):
    with pytest.raises(DodeError, match="λ works with networks that predict noise"):
        DODEScheduler.from_config(config).set_timesteps(4)


@pytest.mark.parametrize(
    "own", [{"sigmas": [1.0, 0.7, 0.5, 0.1]}, {"timesteps": [900.0, 500.0, 300.0, 20.0]}]
)
def test_a_users_own_schedule_is_refused(pipeline, own):
    scheduler = with_rows(pipeline("sd3"), row_of(np.append(np.linspace(1, 0.1, 4), 0))).scheduler
    with pytest.raises(DodeError, match="leave out sigmas and timesteps"):
        scheduler.set_timesteps(**own)
    with pytest.raises(DodeError, match="at least 1"):
        scheduler.set_timesteps(0)


def test_where_no_row_fits_a_users_own_schedule_is_eulers():
    scheduler, theirs = DODEScheduler.from_config(FLOW(shift=3.0).config), FLOW(shift=3.0)
    with pytest.warns(UserWarning, match="plain Euler"):
        scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.2])
    theirs.set_timesteps(sigmas=[1.0, 0.7, 0.2])
    assert torch.equal(scheduler.sigmas, theirs.sigmas)
    assert torch.equal(scheduler.timesteps, theirs.timesteps)


# --- As a scheduler of diffusers ----------------------------------------------------------------------


def test_it_is_saved_with_its_pipeline(pipeline, tmp_path):
    pipe = with_rows(pipeline("sd3"), FLOW_ROWS["bands, x_T and Gaussian"])
    expected = call(pipe, 6)
    pipe.save_pretrained(tmp_path)
    index = (tmp_path / "model_index.json").read_text()
    assert '"dode_nodes.hosts.diffusers",\n    "DODEScheduler"' in index
    missing = {name: None for name, part in pipe.components.items() if part is None}
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True, **missing)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(call(loaded, 6), expected)


@pytest.mark.parametrize("name", ["sd", "sd3"])
@pytest.mark.filterwarnings("ignore:this runs plain Euler")
def test_noise_is_added_as_diffusers_adds_it(pipeline, name):
    theirs = plain_euler(pipeline(name))
    ours = DODEScheduler.from_config(theirs.config)
    clean, noises = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    t = ours.timesteps[[0, 2, 5]]
    assert torch.equal(t, theirs.timesteps[[0, 2, 5]])
    got, expected = (
        each.scale_noise(clean, t, noises) if name == "sd3" else each.add_noise(clean, noises, t)
        for each in (ours, theirs)
    )
    torch.testing.assert_close(got, expected)


def test_a_config_comes_back_unchanged(pipeline, tmp_path):
    config = pipeline("flux").scheduler.config
    table = LambdaTable([FLOW_ROWS["λ"]])
    DODEScheduler.from_table(table, config, strict=True).save_pretrained(tmp_path)
    scheduler = DODEScheduler.from_pretrained(tmp_path)
    assert LambdaTable.from_json(scheduler.config.table) == table
    assert scheduler.config.strict
    again = FLOW.from_config(scheduler.config)
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    assert {name: again.config[name] for name in public} == public


def test_it_names_the_schedulers_that_it_can_stand_for():
    classes = DODEScheduler().compatibles
    assert {diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler, FLOW} <= set(classes)


BAD = {
    "format": lambda table: table.update(format="else"),
    "rows": lambda table: table["table"].update(rows=[]),
    "NaN": lambda table: table["arrays"]["rows.0.weights"].__setitem__(2, math.nan),
    "finite": lambda table: table["arrays"]["rows.0.weights"].__setitem__(2, 1e300),
    "descend": lambda table: table["arrays"]["rows.0.sigmas"].reverse(),
    "invented": lambda table: table["table"]["rows"][0]["requires"].append("invented"),
    "lacks": lambda table: table["arrays"].pop("rows.0.sigmas"),
    "numbers": lambda table: table["arrays"].update({"rows.0.sigmas": "os.system"}),
    "version": lambda table: table.update(version=3),
}


@pytest.mark.parametrize("what", BAD)
def test_a_strangers_folder_passes_the_same_gate_as_a_file(tmp_path, what):
    table = LambdaTable([row_of(karras(6), SIX)]).to_json()
    BAD[what](table)
    config = dict(DODEScheduler().config) | {"table": table}
    with pytest.raises(DodeError, match="λ table: "):
        DODEScheduler.from_config(config)


def test_a_file_is_read_through_the_gate(tmp_path):
    file = tmp_path / "mine.safetensors"
    LambdaTable([row_of(karras(6))]).save(file)
    DODEScheduler.from_table(file, diffusers.EulerDiscreteScheduler().config)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DodeError, match=r"mine\.safetensors"):
        DODEScheduler.from_table(file, diffusers.EulerDiscreteScheduler().config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_half_precision(pipeline, name, dtype):
    row = EPS_ROWS["afs, bands, x_T and Gaussian"] if name == "sd" else FLOW_ROWS["bands, x_T and Gaussian"]
    pipe = with_rows(copy.deepcopy(pipeline(name)), row)
    expected = call(pipe, row.paid_steps)
    pipe.to(dtype)
    half = {
        key: value.to(dtype) for key, value in arguments_of(pipe).items() if isinstance(value, torch.Tensor)
    }
    got = call(pipe, row.paid_steps, **half)
    assert got.dtype == dtype
    assert error(got.float(), expected) < (0.1 if dtype == torch.float16 else 0.5)


def test_each_of_a_batch_is_what_it_is_alone(pipeline):
    pipe = with_rows(pipeline("sd"), EPS_ROWS["afs, bands, x_T and Gaussian"])
    prompts = {key: value for key, value in arguments_of(pipe).items() if key != "latents"}

    def run(*seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        own = {
            key: value[: len(seeds)] if isinstance(value, torch.Tensor) else value
            for key, value in prompts.items()
        }
        return pipe(num_inference_steps=5, **own, generator=generators, return_dict=False)[0]

    assert error(run(1, 2)[:1], run(1)) < 1e-5


def test_a_callback_may_change_the_latents(pipeline):
    row = row_of(FLOW_SIGMAS, SIX)
    pipe = with_rows(pipeline("sd3"), row)
    told: list[int] = []

    def end_at_zero(pipe: Any, i: int, t: torch.Tensor, kept: dict[str, Any]) -> dict[str, Any]:
        told.append(i)
        return {"latents": torch.zeros_like(kept["latents"])} if i == 5 else {}

    assert not call(pipe, 6, callback_on_step_end=end_at_zero).any()
    assert told == [*range(6)]


def test_what_a_mask_protects_is_not_touched(pipeline):
    pipe = pipeline("sd inpaint")
    with_rows(pipe, EPS_ROWS["bands"])
    kept: list[torch.Tensor] = []

    def keep(pipe: Any, i: int, t: torch.Tensor, of: dict[str, Any]) -> dict[str, Any]:
        kept.append(of["latents"])
        return {}

    call(pipe, 6, **seeded(strength=1.0, mask_image=MASK, callback_on_step_end=keep))
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline("sd").scheduler.config)
    protected = kept[-1][..., : SIZE // 2]
    call(pipe, 6, **seeded(strength=1.0, mask_image=MASK, callback_on_step_end=keep))
    torch.testing.assert_close(protected, kept[-1][..., : SIZE // 2])


def test_two_threads_do_what_one_does(pipeline):
    rows = [EPS_ROWS["afs, bands, x_T and Gaussian"], EPS_ROWS["λ of heun"]]
    pipes = [with_rows(pipeline("sd"), row) for row in rows]
    expected = [call(pipe, row.paid_steps) for pipe, row in zip(pipes, rows, strict=True)]
    got: dict[int, torch.Tensor] = {}

    def run(i: int) -> None:
        for _ in range(3):
            got[i] = call(pipes[i], rows[i].paid_steps)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], each) for i, each in enumerate(expected))


def test_a_compiled_transformer(pipeline):
    """It runs, and is known as the same checkpoint."""
    pipe = with_rows(pipeline("sd3"), FLOW_ROWS["λ"])
    expected, facts = call(pipe, 6), model_facts(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert error(call(pipe, 6), expected) < 1e-5
    assert model_facts(pipe) == facts


def test_a_run_that_is_over_says_so(pipeline):
    scheduler = with_rows(pipeline("sd"), row_of(karras(2))).scheduler
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 4, 2, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises((DodeError, IndexError)):
        scheduler.step(x, scheduler.timesteps[-1], x)
