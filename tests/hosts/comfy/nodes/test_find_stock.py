"""Find best stock sampler: what it says is what ComfyUI samples, and it is near the best."""

from __future__ import annotations

import re

import pytest
import torch

from dode_nodes import DodeError
from tests.hosts.comfy.node_calls import CFG, empty, ksampler, rms, sample_custom

pytestmark = pytest.mark.comfyui
STEPS = 5


def find(dode, model, **changes):
    inputs = {
        "positive": dode.inputs.positive, "negative": dode.inputs.negative, "cfg": CFG, "latent": dode.inputs.latent,
        "steps": STEPS, "seed": 0,
    }  # fmt: skip
    return dode.run(dode.pack.FindStock, model=model, **(inputs | changes))


@pytest.mark.whole_race
@pytest.mark.parametrize("kind", ["EPS", "FLOW"])
def test_the_winner_is_near_the_best_that_a_ksampler_can_be_set_to(kind, make_model, dode):
    from dode_nodes.fit import race

    model = make_model(kind)
    sampler, sigmas, summary, report = find(dode, model)
    assert len(sigmas) == STEPS + 1
    assert report.shape[-1] == 3
    converged = ksampler(model, empty(8), sampler="dpmpp_2m", scheduler="simple", steps=200)

    def error(made):
        return float((made - converged).flatten(1).square().mean(1).sqrt().log().mean().exp())

    winner = error(sample_custom(model, sampler, sigmas, empty(8)))
    usual = {
        (name, scheduler): error(ksampler(model, empty(8), sampler=name, scheduler=scheduler, steps=STEPS))
        for name in ("euler", "dpmpp_2m", "ipndm", "deis")
        for scheduler in ("karras", "beta", "simple", "normal")
    }
    assert winner <= 1.1 * min(usual.values())
    tried = int(re.match(r"best of (\d+) at 5 evaluations: ", summary)[1])
    assert tried == 12 + 3 * len(race.ALSO_STOCK)  # each on three schedules


@pytest.mark.parametrize("name", ["dpmpp_2m", "gradient_estimation"])
def test_a_setting_that_a_ksampler_has_is_named_so(name, make_model, dode, monkeypatch, on_the_node):
    """Of one start only: what is said is what a KSampler makes of it."""
    from dode_nodes.fit import race

    monkeypatch.setattr(race, "SOLVERS", ())
    monkeypatch.setattr(race, "ALSO_STOCK", ((name, {}),))
    monkeypatch.setattr(race, "SCHEDULES", dict.fromkeys(race.SCHEDULES, (("beta", False),)))
    model = make_model()
    sampler, sigmas, summary, _ = find(dode, model)
    lines = summary.splitlines()
    assert lines[0] == on_the_node[-1] == f"best of 1 at 5 evaluations: {name}, beta"
    assert lines[1] == f"in KSampler: sampler_name {name}, scheduler beta"
    by_ksampler = ksampler(model, empty(), sampler=name, scheduler="beta", steps=STEPS)
    assert rms(sample_custom(model, sampler, sigmas, empty()), by_ksampler) < 1e-6


def test_its_cost_is_said_before_and_a_picture_is_no_latent_to_begin_with(make_model, dode, on_the_node):
    model = make_model()
    find(dode, model)
    planned = int(re.match(r"at most (\d+) evaluations: ", on_the_node[0])[1])
    per_guidance = 2
    assert model.model.evaluated <= per_guidance * planned
    model = make_model()
    with pytest.raises(DodeError, match="Empty Latent Image"):
        find(dode, model, latent={"samples": torch.ones(1, 4, 4, 4)})
    assert model.model.evaluated == 0
