"""Pictures in the real host: with a table, without one, whole and in part."""

from __future__ import annotations

import gc
import inspect
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.hosts.webui.in_host.pictures import DATA, noise_picture, upper_half

STOCK = "DPM++ 2M"
KINDS: dict[str, dict[str, Any]] = {
    "txt2img": {},
    "hires fix": {
        "enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.5, "hr_cfg": 5.0,
        "hr_additional_modules": ["Use same choices"],
    },
    "img2img": {"kind": "img2img", "denoising_strength": 0.6, "steps": 5},
    "inpainting": {
        "kind": "img2img", "denoising_strength": 0.6, "steps": 5, "mask": upper_half(), "inpaint_full_res": False,
        "inpainting_fill": 1,
    },
}  # fmt: skip


def settings_of(kind: str) -> dict[str, Any]:
    """Fresh: the host may write into them."""
    return {name: value.copy() if hasattr(value, "copy") else value for name, value in KINDS[kind].items()}


@pytest.mark.parametrize("kind", [pytest.param("txt2img", marks=pytest.mark.whole_network), *list(KINDS)[1:]])
def test_without_a_table_every_pixel_is_the_hosts_own(kind, make):
    ours = make("auto", **settings_of(kind))
    stock = make("auto", sampler_name=STOCK, **settings_of(kind))
    assert np.array_equal(ours.pixels, stock.pixels)
    assert (
        ours.said
        == f"D-ODE: {STOCK} runs: there is no λ table for this model. Make one in the tab Distil λ\n"
    )
    assert "D-ODE table: none" in ours.text
    assert "D-ODE" not in stock.text
    assert stock.said == ""


@pytest.mark.parametrize(
    ("kind", "asked"), [("txt2img", 4), ("hires fix", 8), ("img2img", 5), ("inpainting", 5)]
)
def test_a_row_of_zeros_is_the_hosts_euler_over_its_schedule(kind, asked, save, make):
    save("zeros", 4, asked, lam=0.0)
    ours = make("zeros", **settings_of(kind))
    euler = make("zeros", sampler_name="Euler", scheduler="Karras", **settings_of(kind))
    assert "It runs" in ours.said
    assert "fallback" not in ours.text
    torch.testing.assert_close(ours.latents, euler.latents, atol=1e-4, rtol=1e-4)


def test_lambda_changes_the_picture_and_the_line_says_what_runs(save, make):
    table = save("mine", 4)
    assert not torch.allclose(make("mine").latents, make("none").latents, atol=0.1)
    digits = table.sha256[:8]
    chosen = make("auto")
    assert chosen.said == (
        f"D-ODE: λ table mine {digits}: made for this checkpoint. It runs euler, 4 steps (4 evaluations, noise)\n"
    )
    assert f"D-ODE table: mine {digits}" in chosen.text


@pytest.mark.parametrize(("asked", "run"), [(3, 4), (5, 4), (6, 8), (7, 8), (30, 8)])
def test_the_nearest_number_of_steps_runs_and_is_stated(asked, run, save, make):
    save("mine", 4, 8)
    picture = make("mine", steps=asked)
    assert f"Steps: {run}," in picture.text
    assert f"{run} steps are run, not {asked}: this table has 4 and 8 steps" in picture.said
    assert torch.equal(picture.latents, make("mine", steps=run).latents)


def test_img2img_takes_a_row_whose_sigma_fits_or_says_that_stock_runs(save, make):
    save("mine", 8)
    fits = make("mine", kind="img2img", steps=8, denoising_strength=0.4)
    assert "It runs the last 4 steps of euler, 8 steps" in fits.said
    near = make("mine", kind="img2img", steps=7, denoising_strength=0.5)  # 4 of 7, from σ = 1.27
    assert "It runs the last 4 steps of euler, 8 steps" in near.said
    far = make("mine", kind="img2img", steps=20, denoising_strength=0.5)
    assert f"{STOCK} runs: the λ table mine" in far.said
    assert "has no row for the last 11 of 20 steps" in far.said
    assert "Steps: 20," in far.text
    assert f"D-ODE fallback: {STOCK}" in far.text


def test_hires_fix_asks_for_a_row_of_steps_by_denoise(save, make):
    save("mine", 4, 8)
    both = make("mine", **settings_of("hires fix"))
    assert "It runs euler, 4 steps" in both.said
    assert "It runs the last 4 steps of euler, 8 steps" in both.said
    save("four", 4)
    first = make("four", **settings_of("hires fix"))
    assert "It runs euler, 4 steps" in first.said
    assert "no row for the last 4 of 8 steps" in first.said


def test_what_is_not_to_be_repainted_stays(save, make):
    save("mine", 5)
    settings = settings_of("inpainting")
    picture = make("mine", **settings)
    change = (picture.latents - picture.p.init_latent).abs()[0, :, :, 0]
    assert change[:, 5:].max() == 0
    assert change[:, :3].min() > 0


def test_a_refiner_means_stock_for_the_whole_picture(save, make):
    from modules import sd_samplers_common

    save("mine", 4)
    by_share = "completed_ratio" in inspect.getsource(sd_samplers_common.apply_refiner)  # Neo: by σ
    after_the_last = 0.9999 if by_share else 0.001
    settings = {"refiner_checkpoint": "other", "refiner_switch_at": after_the_last}
    ours = make("mine", **settings)
    assert f"D-ODE: {STOCK} runs: a refiner takes over" in ours.said
    assert torch.equal(ours.latents, make("mine", sampler_name=STOCK, **settings).latents)


def test_pictures_of_a_batch_are_those_that_each_is_alone(save, make):
    save("mine", 4)
    many = make("mine", batch_size=2, n_iter=2)
    assert len(many.latents) == 4
    for n, latent in enumerate(many.latents):
        torch.testing.assert_close(make("mine", seed=3 + n).latents[0], latent, atol=1e-3, rtol=1e-3)


def test_interrupting_gives_what_there_is(save, make):
    from modules import script_callbacks, shared

    def interrupt(params: Any) -> None:
        if params.sampling_step == 2:
            shared.state.interrupt()

    save("mine", 8)
    script_callbacks.on_cfg_denoiser(interrupt)
    try:
        picture = make("mine", steps=8)
    finally:
        script_callbacks.remove_callbacks_for_function(interrupt)
        shared.state.interrupted = False
    assert picture.latents.isfinite().all()
    assert not torch.allclose(picture.latents, make("mine", steps=8).latents, atol=1e-3)


def test_skipping_ends_a_picture_and_not_the_next(save, make):
    from modules import script_callbacks, shared

    def skip(params: Any) -> None:
        if params.sampling_step == 2 and shared.state.job_no == 0:
            shared.state.skip()

    save("mine", 8)
    script_callbacks.on_cfg_denoiser(skip)
    shared.state.job_no = 0
    try:
        skipped, whole = make("mine", steps=8, n_iter=2).latents
    finally:
        script_callbacks.remove_callbacks_for_function(skip)
        shared.state.skipped = False
    assert skipped.isfinite().all()
    assert not torch.allclose(skipped, make("mine", steps=8).latents[0], atol=1e-3)
    torch.testing.assert_close(whole, make("mine", steps=8, seed=4).latents[0], atol=1e-3, rtol=1e-3)


def test_the_live_preview_and_the_progress_follow_the_run(save, make, monkeypatch):
    from modules import script_callbacks, shared

    for name, value in {"live_previews_enable": True, "show_progress_type": "Approx cheap"}.items():
        monkeypatch.setitem(shared.opts.data, name, value)
    seen: list[np.ndarray] = []
    done: list[int] = []

    def look(params: Any) -> None:
        if shared.state.current_latent is not None:
            shared.state.do_set_current_image()
            seen.append(np.asarray(shared.state.current_image, dtype=float))
            done.append(shared.state.sampling_step)

    save("mine", 4)
    shared.state.begin(job="looking")
    script_callbacks.on_cfg_denoiser(look)
    try:
        make("mine")
        shared.state.do_set_current_image()
        end = np.asarray(shared.state.current_image, dtype=float)
    finally:
        script_callbacks.remove_callbacks_for_function(look)
        shared.state.end()
    assert done == [0, 1, 2]
    distances = [np.abs(each - end).mean() for each in seen]
    assert distances[0] > distances[1] > distances[2] > 0


def test_parts_that_another_script_repaints_have_the_whole_pictures_table(save, make):
    """As ADetailer works: for each finished picture, img2img under a mask, with steps or a sampler of its own."""
    from modules import processing, scripts

    done: list[Any] = []
    of_part = {"prompt": "a face", "negative_prompt": "", "seed": 7, "denoising_strength": 0.6, "inpainting_fill": 1,
               "inpaint_full_res": False}  # fmt: skip

    def repaint(picture: Any, **settings: Any) -> Any:
        inner = processing.StableDiffusionProcessingImg2Img(
            init_images=[picture], width=64, height=64, cfg_scale=5.0, scheduler="Automatic", mask=upper_half(),
            do_not_save_samples=True, do_not_save_grid=True, **of_part, **settings,
        )  # fmt: skip
        inner.scripts, inner.script_args = scripts.ScriptRunner(), ()
        torch.manual_seed(0)
        return processing.process_images(inner)

    class Detailer(scripts.Script):
        def title(self) -> str:
            return "Detailer"

        def postprocess_image(self, p: Any, pp: Any, *args: Any) -> None:
            done.append(repaint(noise_picture(), sampler_name="D-ODE", steps=5))
            done.append(repaint(noise_picture(), sampler_name="Euler", steps=4))
            pp.image = done[-2].images[0]

    save("mine", 4, 5)
    save("other", 4, 5, lam=-0.5)
    whole = make("mine", n_iter=2, others=[Detailer()])
    assert torch.equal(whole.latents, make("mine", n_iter=2).latents)  # the second is made after inner ones
    assert np.array_equal(whole.pixels, np.asarray(done[0].images[0]))
    alone = make("mine", kind="img2img", steps=5, mask=upper_half(), **of_part)
    assert len(done) == 4
    for ours, euler in zip(done[::2], done[1::2], strict=True):
        assert "λ table mine" in ours.comments
        assert "It runs the last 4 steps of euler, 5 steps" in ours.comments
        assert "D-ODE" not in euler.comments + euler.infotexts[0]
        assert np.array_equal(np.asarray(ours.images[0]), alone.pixels)
    gc.collect()
    make("none")
    gc.collect()
    later = repaint(noise_picture(), sampler_name="D-ODE", steps=5)
    assert "made for this checkpoint" in later.comments  # chosen anew: it is no part of another picture


def test_a_row_that_ends_in_nan_is_named(save, make, small_network):
    from dode_nodes.errors import NotFinite

    save("broken", 4)
    small_network.kernel.data.mul_(float("nan"))
    with pytest.raises(NotFinite, match="the λ table 'broken"):
        make("broken")


def test_a_table_for_another_kind_of_model_is_not_run(save, make):
    save("xl", 4, family="sdxl")
    picture = make("xl")
    assert (
        f"{STOCK} runs: this λ table was made for another kind of model: its family is 'sdxl'" in picture.said
    )
    assert torch.equal(picture.latents, make("none").latents)


def test_a_row_that_cannot_run_means_stock_of_the_steps_that_were_asked_for(save, make, lambdas):
    from dode_nodes import LambdaRow, LambdaTable

    mine = save("mine", 5)
    (row,) = mine.rows
    asks_more = LambdaRow("heun", row.sigmas, row.evaluations, row.weights)
    LambdaTable([asks_more], model=mine.model).save(lambdas / "wrong.safetensors")
    picture = make("wrong", steps=4)
    assert (
        f"D-ODE: {STOCK} runs: the λ table wrong {LambdaTable([asks_more]).sha256[:8]} cannot be used: "
        "the sampler 'heun' asks the network 9 times" in picture.said
    )
    assert picture.said.count("D-ODE:") == 1
    assert torch.equal(picture.latents, make(sampler_name=STOCK, steps=4).latents)


def test_another_checkpoint_of_the_family_is_said(save, make):
    save("other", 4, fingerprint={"ascending": 0, "samples": [[float(n) for n in range(16)]]})
    assert "the λ table was made for another checkpoint of this family" in make("other").said
    assert "only a family match" in make("auto").said


def test_guidance_far_from_the_tables_is_said(save, make):
    save("mine", 4)
    assert "λ was distilled at cfg 5, this is cfg 9" in make("mine", cfg_scale=9.0).said


def test_a_table_that_nobody_has_picked_is_not_taken_unasked(save, make):
    save("stranger", 4)
    assert "choose the λ table stranger once by name" in make("auto").said
    make("stranger")
    assert "made for this checkpoint" in make("auto").said


def test_flow_models(as_flow, save, make):
    as_flow()
    save("flow", 4, 5, lam=0.0)
    for kind in ("txt2img", "img2img"):
        ours = make("flow", **settings_of(kind))
        assert "It runs" in ours.said
        euler = make("flow", sampler_name="Euler", scheduler="Karras", **settings_of(kind))
        torch.testing.assert_close(ours.latents, euler.latents, atol=1e-4, rtol=1e-4)
    save("eps", 4, prediction_type="eps")
    assert "its prediction type is 'eps', this model's is 'flow'" in make("eps").said


@pytest.mark.whole_network
def test_the_same_picture_for_comfyui_to_make(save, make):
    """Compared by the process that runs this one."""
    save("same", 4, 6)
    options = {"sgm_noise_multiplier": True}
    pictures = {
        str(steps): make("same", steps=steps, override_settings=dict(options)).latents for steps in (4, 6)
    }
    torch.save(pictures, DATA / "pictures.pt")
    (DATA / "same.safetensors").write_bytes((DATA / "models/lambdas/same.safetensors").read_bytes())


@pytest.mark.whole_network
def test_names_of_the_family(host):
    from dode_nodes.hosts.webui.model_facts import model_facts, patches_of

    facts = model_facts(host)
    assert (facts["family"], facts["prediction_type"], facts["channels"]) == ("sd15", "eps", 4)
    assert facts["sigma_max"] == pytest.approx(14.6146, rel=1e-4)
    assert len(facts["fingerprint"]["samples"]) > 30
    assert patches_of(host) == {"weights": 0, "strengths": []}


def test_a_lora_is_seen_and_the_fingerprint_stays(host, small_network):
    from dode_nodes.hosts.webui import model_facts

    if not hasattr(getattr(getattr(host, "forge_objects", None), "unet", None), "lora_loader"):
        pytest.skip("Forge and Neo keep LoRAs in this way")
    host.forge_objects.unet.model.diffusion_model = small_network
    before = model_facts.model_facts(host)["fingerprint"]
    unet = host.forge_objects.unet.clone()
    key, weight = "diffusion_model.kernel", torch.ones(4, 4, 3, 3)
    unet.add_patches(filename="a.safetensors", patches={key: ("diff", (weight,))}, strength_patch=0.5)
    unet.lora_loader.refresh(lora_patches=unet.lora_patches)
    try:
        assert not torch.equal(small_network.kernel, SimpleNamespace(w=unet.lora_loader.backup[key]).w)
        model = SimpleNamespace(
            forge_objects=SimpleNamespace(unet=unet, vae=host.forge_objects.vae), model_config=host.model_config,
            sd_checkpoint_info=SimpleNamespace(filename="looked at only now"),
        )  # fmt: skip
        assert model_facts.model_facts(model)["fingerprint"] == before
        assert model_facts.patches_of(model) == {"weights": 1, "strengths": [0.5]}
    finally:
        unet.lora_loader.refresh(lora_patches={})


def test_the_version_of_the_host_is_a_rows_name_for_it():
    from modules import processing

    assert re.fullmatch(r"[\w.\-+]+", processing.program_version())
