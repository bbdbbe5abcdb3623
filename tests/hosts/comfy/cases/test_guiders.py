"""A GUIDER in place of model, prompts and cfg: its runs are SamplerCustomAdvanced's, and it is left as it was."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hosts.comfy.cases.fidelity import SCALE, SEED, TOLERANCE, schedule_of, stock_of, teachers_grid
from tests.hosts.comfy.cases.pack import Pack
from tests.hosts.comfy.cases.subjects import Conditioning, Latent, Subject, rms, small, stock_node
from tests.hosts.comfy.cases.test_hooks import LATE, hook, hooked
from tests.hosts.conftest import conditioning

pytestmark = pytest.mark.comfyui

LATENTS = 4
"""One of them is held out."""
SIDE = 4
STEPS = 3
INSTEAD = {"model": None, "positive": None, "negative": None}
"""What a guider brings."""


def node(name: str, module: str = "nodes_custom_sampler", **inputs: Any) -> Any:
    return stock_node(module, name, **inputs)


def basic(subject: Subject, other: Conditioning) -> Any:
    return node("BasicGuider", model=subject.model, conditioning=subject.positive)


def plain(subject: Subject, other: Conditioning) -> Any:
    return node(
        "CFGGuider", model=subject.model, positive=subject.positive, negative=subject.negative, cfg=3.0
    )


def dual(subject: Subject, other: Conditioning, style: str = "regular") -> Any:
    return node(
        "DualCFGGuider", model=subject.model, cond1=subject.positive, cond2=other, negative=subject.negative,
        cfg_conds=2.0, cfg_cond2_negative=3.0, style=style,
    )  # fmt: skip


def nested(subject: Subject, other: Conditioning) -> Any:
    return dual(subject, other, "nested")


def perpendicular(subject: Subject, other: Conditioning) -> Any:
    """It measures angles over the whole batch."""
    return node(
        "PerpNegGuider", "nodes_perpneg", model=subject.model, positive=subject.positive, negative=other,
        empty_conditioning=subject.negative, cfg=2.0, neg_scale=0.7,
    )  # fmt: skip


def of_another_pack(subject: Subject, other: Conditioning) -> Any:
    """Guidance by a scale of its own that fades out, and that counts its evaluations from the start of each run."""
    import comfy.samplers

    class Fading(comfy.samplers.CFGGuider):
        def set_scale(self, scale: float) -> None:
            self.scale = scale

        def sample(self, *args: Any, **kwargs: Any) -> Tensor:
            self.evaluated = 0
            return super().sample(*args, **kwargs)

        def predict_noise(
            self, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None = None
        ) -> Tensor:
            self.evaluated += 1
            conds = [self.conds["positive"], self.conds["other"]]
            one, two = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
            return two + (one - two) * (1 + self.scale * timestep[:1].clamp(max=1).reshape(1, 1, 1, 1))

    guider = Fading(subject.model)
    guider.inner_set_conds({"positive": subject.positive, "other": other})
    guider.set_scale(1.5)
    return guider


GUIDERS = [basic, plain, dual, nested, perpendicular, of_another_pack]


def sampled(guider: Any, sampler: Any, sigmas: Tensor, latent: Latent, index: int) -> Tensor:
    """Noise ``index`` of the run, by SamplerCustomAdvanced; the sampler, or its name."""
    if isinstance(sampler, str):
        sampler = node("KSamplerSelect", sampler_name=sampler)
    return node(
        "SamplerCustomAdvanced",
        noise=node("RandomNoise", noise_seed=SEED), guider=guider, sigmas=sigmas,
        sampler=sampler, latent_image=latent | {"batch_index": [index]},
    )["samples"]  # fmt: skip


def distances(dode: Pack, subject: Subject, guider: Any, **changes: Any) -> tuple[float, float]:
    """How far the worst stock latent, and the worst teacher latent, is from every one of SamplerCustomAdvanced."""
    settings = {"latents": LATENTS, "seed": SEED, "scale": SCALE, "steps": str(STEPS)} | INSTEAD
    made = dode.distil(subject, guider=guider, **settings | changes)
    sigmas = schedule_of(subject, subject.scheduler, STEPS)
    worst = []
    for output, sampler, grid in (
        ("stock", *(stock_of(made["table"].rows[0], subject) or ("euler", sigmas))),
        ("teacher", "dpmpp_2m", teachers_grid(sigmas, subject.scheduler == "simple")),
    ):
        theirs = [sampled(guider, sampler, grid, subject.latent, i) for i in range(LATENTS)]
        worst.append(
            max(min(rms(mine, their) for their in theirs) for mine in made[output]["samples"].split(1))
        )
    return worst[0], worst[1]


@pytest.mark.parametrize(
    ("kind", "make"), [*(("eps", make) for make in GUIDERS), ("flow", dual), ("flow", of_another_pack)]
)
def test_runs_are_those_of_sampler_custom_advanced(kind, make, dode):
    subject = small(kind)
    guider = make(subject, conditioning(5.0))
    micro_batch = {perpendicular: 1, dual: 3}.get(make, 0)
    stock, teacher = distances(dode, subject, guider, micro_batch=micro_batch)
    assert stock < TOLERANCE
    assert teacher < TOLERANCE


@pytest.mark.parametrize("make", [plain, dual])
def test_hooks_of_a_guiders_prompts_act(make, dode):
    subject = small()
    hooks = hooked(subject.positive, hook(subject, frames=LATE))
    guider = make(replace(subject, positive=hooks), conditioning(5.0))
    stock, teacher = distances(dode, subject, guider)
    assert stock < TOLERANCE
    assert teacher < TOLERANCE


@pytest.mark.parametrize("make", GUIDERS)
def test_a_guider_is_left_as_it_was(make, dode):
    subject = small()
    guider = make(subject, conditioning(5.0))
    before, fields = sampled(guider, "euler", SIGMAS, subject.latent, 0), dict(vars(guider))
    made = dode.distil(
        subject, guider=guider, latents=2, steps="2", scale=2, micro_batch=1, save_name="left", **INSTEAD
    )
    dode.compare(subject, made["table"], guider=guider, steps=2, pictures=1, **INSTEAD)
    assert vars(guider) == fields
    assert torch.equal(sampled(guider, "euler", SIGMAS, subject.latent, 0), before)


SIGMAS = torch.tensor([10.0, 3.0, 1.0, 0.0])


@pytest.mark.parametrize("make", GUIDERS)
def test_compare_samples_as_sampler_custom_advanced(make, dode):
    subject = dode.demo(side=8)
    guider = make(subject, conditioning(5.0))
    table = dode.shipped("eps")
    made = dode.compare(subject, table, guider=guider, pictures=1, seed=SEED, steps=6, **INSTEAD)
    sampler = dode.run("DODE_Sampler", table=table, solver="any")["sampler"]
    sigmas = dode.run("DODE_Sigmas", table=table, steps=6, denoise=1.0, solver="any")["sigmas"]
    theirs = node(
        "SamplerCustomAdvanced", noise=node("RandomNoise", noise_seed=SEED), guider=guider, sampler=sampler,
        sigmas=sigmas, latent_image=subject.latent,
    )["samples"]  # fmt: skip
    assert rms(made["d-ode"]["samples"], theirs) < TOLERANCE


def test_a_table_remembers_the_scale_where_the_guider_says_one(dode):
    subject = small()
    little = {"latents": 2, "steps": "2", "scale": 1, "micro_batch": 1} | INSTEAD
    kept = {
        make: dode.distil(subject, guider=make(subject, conditioning(5.0)), **little)["table"]
        .rows[0]
        .settings
        for make in GUIDERS
    }
    scales = {make: settings.get("cfg") for make, settings in kept.items()}
    assert scales == {
        basic: 1.0, plain: 3.0, dual: None, nested: None, perpendicular: 2.0, of_another_pack: None,
    }  # fmt: skip


@pytest.mark.parametrize(("make", "said_cfg"), [(plain, {"3"}), (dual, set()), (of_another_pack, set())])
def test_remarks_go_by_the_guiders_own_scale(make, said_cfg, dode, said):
    """The table is of cfg 2; cfg 7 is what the widget says, and is ignored."""
    subject = dode.demo()
    guider = make(subject, conditioning(5.0))
    dode.compare(subject, dode.shipped("eps"), guider=guider, steps=6, cfg=7.0, **INSTEAD)
    assert set(re.findall(r"this is cfg (\S+)", said())) == said_cfg


# --- What is refused


@pytest.mark.parametrize(
    "beside", [["model"], ["negative"], ["positive", "negative"], ["model", "positive_2"]]
)
def test_a_guider_beside_what_it_brings_is_refused_by_name(beside, dode):
    subject = small()
    parts = {"model": subject.model, "positive": subject.positive, "negative": subject.negative}
    given = INSTEAD | {name: parts.get(name, subject.positive) for name in beside}
    with pytest.raises(
        dode.library.DodeError, match=f"^disconnect {' and '.join(beside)}, or the guider"
    ) as raised:
        dode.distil(subject, guider=plain(subject, subject.positive), **given)
    assert not subject.calls
    if "positive_2" not in beside:
        with pytest.raises(dode.library.DodeError, match=re.escape(str(raised.value))):
            dode.compare(subject, dode.shipped("eps"), guider=plain(subject, subject.positive), **given)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["model"], "connect model; or connect a guider"),
        (["positive"], "connect positive; or"),
        (["positive", "negative"], "connect positive and negative; or"),
        (
            ["model", "positive", "negative"],
            "connect model, positive and negative; or connect a guider in place",
        ),
    ],
)
def test_what_is_missing_without_a_guider_is_named(missing, words, dode):
    subject = small()
    given = dict.fromkeys(missing)
    with pytest.raises(dode.library.DodeError, match=f"^{words}"):
        dode.distil(subject, **given)
    with pytest.raises(dode.library.DodeError, match=f"^{words}"):
        dode.compare(subject, dode.shipped("eps"), **given)


def runs_twice(guider: Any, run: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    run(noise, *args, **kwargs)
    return run(noise, *args, **kwargs)


def runs_never(guider: Any, run: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return noise


def runs_over_parts(guider: Any, run: Any, noise: Tensor, empty: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return run(noise[..., :2], empty[..., :2], *args, **kwargs)


def runs_other_sigmas(
    guider: Any,
    run: Any,
    noise: Tensor,
    empty: Tensor,
    sampler: Any,
    sigmas: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    return run(noise, empty, sampler, sigmas * 0.9, *args, **kwargs)


@pytest.mark.parametrize("way", [runs_twice, runs_never, runs_over_parts, runs_other_sigmas])
def test_a_guider_that_does_not_make_one_plain_run_is_refused(way, dode):
    import comfy.samplers

    class Odd(comfy.samplers.CFGGuider):
        def sample(self, *args: Any, **kwargs: Any) -> Tensor:
            return way(self, super().sample, *args, **kwargs)

    subject = small()
    guider = Odd(subject.model)
    guider.set_conds(subject.positive, subject.negative)
    with pytest.raises(dode.library.DodeError, match="use another guider"):
        dode.distil(subject, guider=guider, **INSTEAD)
    assert len(subject.calls) <= 12


def test_a_guider_that_changes_in_the_course_of_a_run_is_refused(dode):
    """A fit begins runs in the middle, where such a guider would begin anew."""
    import comfy.samplers

    class Ending(comfy.samplers.CFGGuider):
        def sample(self, *args: Any, **kwargs: Any) -> Tensor:
            self.left = 2
            return super().sample(*args, **kwargs)

        def predict_noise(self, *args: Any, **kwargs: Any) -> Tensor:
            self.left -= 1
            if self.left < 0:
                self.cfg = 1.0
            return super().predict_noise(*args, **kwargs)

    subject = small()
    guider = Ending(subject.model)
    guider.set_conds(subject.positive, subject.negative)
    guider.set_cfg(4.0)
    with pytest.raises(dode.library.DodeError, match="use other guidance to distil"):
        dode.distil(subject, guider=guider, **INSTEAD)
    assert len(subject.calls) <= 16
