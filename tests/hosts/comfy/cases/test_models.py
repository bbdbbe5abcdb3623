"""Models as people load them: weights that cannot be read, other number formats, frames for a batch; and samplers."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import FRAMES, Subject, ksampler, small, video
from tests.hosts.comfy.node_calls import saved_as

pytestmark = pytest.mark.comfyui

# --- weights that cannot be read


def like_gguf(model: Any) -> Any:
    """As ComfyUI-GGUF's layers: for a state dict they hand out tensors without values, to count memory by."""
    for module in model.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module._save_to_state_dict = _without_values(module)
    return model


def _without_values(module: torch.nn.Module) -> Any:
    def save(destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, weight in module._parameters.items():
            if weight is not None:
                destination[prefix + name] = torch.zeros_like(weight, device="meta")

    return save


def use_distill(dode: Pack, subject: Subject) -> None:
    table = dode.distil(subject)["table"]
    dode.ksampler(subject, table)


def use_ksampler(dode: Pack, subject: Subject) -> None:
    dode.ksampler(subject, dode.shipped("eps"))


def use_apply(dode: Pack, subject: Subject) -> None:
    ksampler(replace(subject, model=dode.apply(subject.model, dode.shipped("eps"))))


def use_compare(dode: Pack, subject: Subject) -> None:
    dode.compare(subject, dode.shipped("eps"))


def as_it_is(model: Any) -> Any:
    return model


@pytest.mark.parametrize("use", [use_distill, use_ksampler, use_apply, use_compare])
@pytest.mark.parametrize(
    "change",
    [
        as_it_is,
        like_gguf,
    ],
)
def test_a_model_whose_state_dict_has_no_values(change, use, dode, said):
    """No node fails, and the tables of the model are those of another number format of it: not remarked on."""
    subject = dode.demo()
    change(subject.model)
    use(dode, subject)
    assert not said()


def fail_to_be_read(model: Any) -> None:
    """From now on there is no state dict."""
    model.model_size()  # ComfyUI itself has read it, for this number

    def no_state_dict(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no state dict today")

    model.model.diffusion_model.state_dict = no_state_dict
    model.model.state_dict = no_state_dict


def test_a_model_that_cannot_be_looked_at_costs_no_rows(dode, tables):
    """It may be refused, but first; or the table is saved with what is known."""
    subject = small()
    fail_to_be_read(subject.model)
    ksampler(subject)
    subject.calls.clear()
    try:
        dode.distil(subject)
    except dode.library.DodeError:
        assert not subject.calls
    else:
        assert dode.library.LambdaTable.load(saved_as("table", tables)).rows


def test_the_model_is_looked_at_before_the_first_evaluation(dode, tables):
    """Whatever becomes of it meanwhile."""
    subject = small()
    evaluate = subject.model.model._apply_model

    def evaluate_and_forget(*args: Any, **kwargs: Any) -> Any:
        fail_to_be_read(subject.model)
        return evaluate(*args, **kwargs)

    subject.model.model._apply_model = evaluate_and_forget
    table = dode.distil(subject)["table"]
    dode.ksampler(small(), table)
    assert dode.library.LambdaTable.load(saved_as("table", tables)) == table


# --- one checkpoint in several number formats


@pytest.fixture
def weights(checkpoint: Any) -> dict[str, torch.Tensor]:
    """The network's, as a file of it alone has them."""
    import comfy.utils

    prefix = "model.diffusion_model."
    everything = comfy.utils.load_torch_file(str(checkpoint))
    return {name.removeprefix(prefix): each for name, each in everything.items() if name.startswith(prefix)}


def load(weights: dict[str, torch.Tensor], **options: Any) -> Any:
    """As Load Diffusion Model does; ``dtype`` is its weight_dtype."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options=options)


def as_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As fp8 files are made: matrices only."""
    return {name: each.to(torch.float8_e4m3fn) if each.ndim > 1 else each for name, each in weights.items()}


@pytest.fixture(scope="module")
def made() -> list[Any]:
    """The table of the checkpoint, once there is one."""
    return []


@pytest.fixture
def table(made: list[Any], sd15: Subject, dode: Pack) -> Any:
    """Of the checkpoint; distilled by the first who asks: its network is a slow one."""
    if not made:
        made.append(dode.distil(sd15, steps="2", scale=2, latents=2)["table"])
    return made[0]


@pytest.mark.parametrize(
    ("dtype", "file"),
    [
        ("float32", "fp16"),
        ("bfloat16", "fp16"),
        ("float8_e4m3fn", "fp16"),
        ("float8_e5m2", "fp16"),
        (None, "fp8"),
    ],
)
def test_a_checkpoint_is_recognised_in_every_number_format(dtype, file, table, weights, dode, said):
    """Or it is said as it is: the same model in another format."""
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    dode.apply(load(as_fp8(weights) if file == "fp8" else weights, **options), table)
    assert "another checkpoint" not in said()
    assert not said() or "number format" in said()


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_another_checkpoint_is_another_in_every_number_format(dtype, table, weights, dode, said):
    generator = torch.Generator().manual_seed(5)
    other = {
        name: each + each.std() * torch.randn(each.shape, generator=generator).to(each)
        if each.ndim > 1
        else each
        for name, each in weights.items()
    }
    dode.apply(load(other, dtype=getattr(torch, dtype)), table)
    assert "another checkpoint" in said()


# --- a batch that is the frames of one video


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 1}, {"micro_batch": 2}, {"latents": 16}], ids=str)
def test_the_frames_of_one_video_are_one_latent(changes, dode):
    """Or it is refused before the first evaluation."""
    subject = video()
    try:
        made = dode.distil(subject, **({"latents": 2, "steps": "2", "scale": 2} | changes))
    except dode.library.DodeError:
        assert not subject.calls
        return
    assert all(size % FRAMES == 0 for size in subject.calls)
    assert all(len(made[name]["samples"]) % FRAMES == 0 for name in ("stock", "d-ode", "teacher"))
    sampled = dode.ksampler(subject, made["table"], steps=2)["samples"]
    assert len(sampled) == FRAMES


# --- samplers of other packs


def euler_to(model, x, sigmas, i, extra_args):
    denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
    return denoised + (x - denoised) * sigmas[i + 1] / sigmas[i]


def sample_with_notes(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler that keeps its notes where RES4LYF's samplers do, for its own model patches to read."""
    options = extra_args["model_options"]["transformer_options"]
    options["sample_sigmas"] = sigmas
    options["regional_conditioning_weight"] = 0.0
    for options["row"] in range(len(sigmas) - 1):
        x = euler_to(model, x, sigmas, options["row"], extra_args)
    return x


def sample_with_a_drawer(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler that keeps its place in a drawer of its own, beside ComfyUI's options."""
    drawer = extra_args["model_options"].setdefault("mypack", {"i": 0, "kept": []})
    while drawer["i"] < len(sigmas) - 1:
        x = euler_to(model, x, sigmas, drawer["i"], extra_args)
        drawer["kept"].append(x)
        drawer["i"] += 1
    return x


def sample_with_own_options(
    model, x, sigmas, extra_args=None, callback=None, disable=None, extra_options="", **others
):
    """Euler that looks its own settings up by keyword: "order=1", or others["order"]."""
    settings = dict(each.split("=") for each in extra_options.split()) | others
    for i in range(len(sigmas) - 1):
        x = euler_to(model, x, sigmas, i, extra_args) if int(settings.get("order", 1)) == 1 else None
    return x


def sample_with_a_look_behind(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler that looks at all that a sampler of another pack looks at, before it begins."""
    guider = model.inner_model
    patcher, network = guider.model_patcher, guider.inner_model
    assert patcher.get_model_object("model_sampling").sigma_max > 0
    assert patcher.model.model_sampling is network.model_sampling
    assert network.device == patcher.load_device == x.device
    assert network.diffusion_model._get_name()
    assert not hasattr(network.diffusion_model, "y0_standard_guide")
    assert network.latent_format.latent_channels == 4
    assert network.process_latent_in(x).shape == x.shape
    assert isinstance(guider.model_options, dict)
    assert isinstance(guider.conds, dict)
    assert guider.cfg >= 1
    for i in range(len(sigmas) - 1):
        x = euler_to(model, x, sigmas, i, extra_args)
    return x


def slowly(sample):
    """As RES4LYF's, which have much to compute between two evaluations."""

    def sample_slowly(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def slow(x, sigma, **extra_args):
            end = time.thread_time() + 0.1
            while time.thread_time() < end:
                pass
            return model(x, sigma, **extra_args)

        return sample(slow, x, sigmas, extra_args, callback, disable)

    return sample_slowly


def sample_sde(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler with fresh noise from the seed, as RES4LYF's samplers without "_ode" in their names."""
    generator = torch.Generator().manual_seed(extra_args.get("seed", 0))
    for i in range(len(sigmas) - 1):
        x = euler_to(model, x, sigmas, i, extra_args)
        x = x + 0.1 * sigmas[i + 1] * torch.randn(x.shape, generator=generator)
    return x


def sample_with_a_hook(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As CFG++: goes by what a hook on the guidance has seen."""
    seen = {}
    options = extra_args["model_options"]
    options["sampler_post_cfg_function"] = [lambda args: seen.update(args) or args["denoised"]]
    for i in range(len(sigmas) - 1):
        x = euler_to(model, x, sigmas, i, extra_args)
    return x


OFFERED = {
    "notes": sample_with_notes,
    "drawer": sample_with_a_drawer,
    "options": sample_with_own_options,
    "look": sample_with_a_look_behind,
    "slow": slowly(sample_with_notes),
}
REFUSED = {"sde": sample_sde, "slow_sde": slowly(sample_sde), "hook": sample_with_a_hook}


@pytest.fixture
def other_packs_samplers(dode, monkeypatch):
    """In ComfyUI's drop-down, as packs put theirs there."""
    import comfy.k_diffusion.sampling
    import comfy.samplers

    everybody = OFFERED | REFUSED
    for name, sample in everybody.items():
        monkeypatch.setattr(comfy.k_diffusion.sampling, f"sample_my_{name}", sample, raising=False)
    names = [*comfy.samplers.SAMPLER_NAMES, *(f"my_{name}" for name in everybody)]
    monkeypatch.setattr(comfy.samplers, "SAMPLER_NAMES", names)


@pytest.mark.usefixtures("other_packs_samplers")
def test_samplers_of_other_packs_are_offered_where_they_are_deterministic(dode):
    node = dode.inputs_of("DODE_DistillOptions")
    offered = [name.removeprefix("my_") for name in node["solver"].options if name.startswith("my_")]
    assert offered == list(OFFERED)
    assert "my_notes" in dode.inputs_of("DODE_KSampler")["solver"].options


def test_a_list_does_not_wait_for_slow_samplers_to_be_proved(dode, other_packs_samplers, monkeypatch):
    """Of each two runs over two steps. They are no teachers then."""
    import comfy.k_diffusion.sampling

    evaluations = 0

    def counted(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def counting(x, sigma, **extra_args):
            nonlocal evaluations
            evaluations += 1
            return model(x, sigma, **extra_args)

        return OFFERED["slow"](counting, x, sigmas, extra_args, callback, disable)

    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_my_slow", counted)
    inputs = dode.inputs_of("DODE_DistillOptions")
    assert "my_slow" in inputs["solver"].options
    assert evaluations == 4
    teachers = [name for name in inputs["teacher"].options if name.startswith("my_")]
    assert teachers == ["my_notes", "my_drawer", "my_options", "my_look"]


@pytest.mark.usefixtures("other_packs_samplers")
@pytest.mark.parametrize("name", [name for name in OFFERED if name != "slow"])
def test_a_sampler_of_another_pack_is_distilled_and_run(name, dode, said):
    """They are Euler's method: its λ."""
    made = dode.distil(small(), solver=f"my_{name}", steps="3", latents=4)
    by_euler = dode.distil(small(), steps="3", latents=4)["table"].rows[0]
    (row,) = made["table"].rows
    assert row.weights == pytest.approx(by_euler.weights, abs=1e-4)
    zero = replace_lambda(dode, made["table"], 0.0)
    subject = small()
    stock = ksampler(subject, steps=3, sampler_name=f"my_{name}")
    torch.testing.assert_close(dode.ksampler(subject, zero, steps=3)["samples"], stock)
    assert not said()


def replace_lambda(dode: Pack, table: Any, value: float) -> Any:
    rows = [replace(row, weights=[value] * len(row.weights)) for row in table.rows]
    return dode.library.LambdaTable(rows, model=table.model)


@pytest.mark.usefixtures("other_packs_samplers")
@pytest.mark.parametrize(
    ("name", "why"), [("sde", "is stochastic"), ("slow_sde", "is stochastic"), ("hook", "guidance")]
)
def test_a_sampler_that_cannot_be_distilled_is_refused_before_the_first_evaluation(name, why, dode):
    subject = small()
    with pytest.raises(dode.library.DodeError, match=why):
        dode.distil(subject, solver=f"my_{name}")
    assert not subject.calls


# --- a row whose sampler is not here


def run_by_sampler(dode: Pack, subject: Subject, table: Any) -> None:
    """D-ODE sampler and D-ODE sigmas in a SamplerCustom."""
    import comfy.sample

    sampler = dode.run("DODE_Sampler", table=table, solver="any")["sampler"]
    sigmas = torch.tensor(table.rows[0].sigmas, dtype=torch.float32)
    latent = subject.latent["samples"]
    noise = comfy.sample.prepare_noise(latent, 5)
    comfy.sample.sample_custom(
        subject.model, noise, 2.0, sampler, sigmas, subject.positive, subject.negative, latent, seed=5
    )


@pytest.mark.parametrize("use", [Pack.ksampler, Pack.compare, run_by_sampler])
def test_a_row_whose_sampler_is_missing_says_which_and_what_the_table_has_instead(use, dode):
    subject = small()
    (row,) = dode.distil(subject)["table"].rows
    missing = replace(row, solver="res_2m_ode")
    table = dode.library.LambdaTable([missing])
    lack = "needs the sampler 'res_2m_ode', which this ComfyUI does not have: install the node pack that brings it"
    subject.calls.clear()
    with pytest.raises(dode.library.DodeError, match=f"{lack}$"):
        use(dode, subject, table)
    others = [replace(row, solver="heun", evaluations=(2, 2, 2, 2, 1), weights=[0.0] * 9, errors=None)]
    others += [replace(row, solver="mine_too"), replace(row, errors=None)]
    table = dode.library.LambdaTable([missing, *others])
    instead = r", or choose another solver. This table also has rows for heun \(5 steps \(9 evaluations\)\), euler \("
    with pytest.raises(dode.library.DodeError, match=lack + instead):
        use(dode, subject, table)
    assert not subject.calls


def test_a_row_of_somebodys_own_function_says_so(dode):
    subject = small()
    (row,) = dode.distil(subject)["table"].rows
    table = dode.library.LambdaTable([replace(row, solver="<mine>")])
    with pytest.raises(dode.library.DodeError, match="needs the function <mine> of the person who made it"):
        dode.ksampler(subject, table)


def test_a_sampler_that_nobody_knows_is_told_from_all_that_this_comfyui_has(dode):
    from comfy.samplers import SAMPLER_NAMES

    with pytest.raises(dode.library.DodeError, match="no solver is called 'res_multistap'") as refused:
        dode.distil(small(), teacher="res_multistap")
    assert "(did you mean res_multistep?)" in str(refused.value)
    assert set(SAMPLER_NAMES) <= set(str(refused.value).split("there are ")[1].split(", "))
