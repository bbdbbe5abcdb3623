"""Whether a table is for a model: families, old tables, shifts and ranges of σ."""

from __future__ import annotations

import copy

import pytest
import torch

from dode_nodes import DodeError, LambdaTable
from dode_nodes.demo.catalogue import load_model
from tests.hosts.comfy.node_calls import empty, zero_table
from tests.hosts.comfy.tiny_networks import UNET, real
from tests.import_comfyui import REPOSITORY

pytestmark = pytest.mark.comfyui


def test_another_familys_table_is_refused(make_model, dode):
    table = zero_table(make_model("EPS"), "euler")
    for other in (make_model("FLOW"), make_model("EPS", channels=16)):
        with pytest.raises(DodeError, match="another kind of model"):
            dode.ksampler(other, table, empty())
        with pytest.raises(DodeError, match="another kind of model"):
            dode.apply(other, table)
        with pytest.raises(DodeError, match="another kind of model"):
            dode.compare(other, table, steps=8)


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_a_table_of_the_first_kind_still_knows_its_checkpoint(kind, pack, run_node):
    """The family by the host's class, the fingerprint by names: as the tables of version 0.1."""
    from dode_nodes.hosts.comfy.model_facts import check_model

    table = LambdaTable.load(REPOSITORY / "tests" / "tables" / "files" / f"demo_{kind}.safetensors")
    model = run_node(pack.DemoModel, kind=kind, digit=3)[0]
    assert check_model(table.model, model) == []
    network = model.model.diffusion_model
    model.model.diffusion_model = torch.compile(network)
    assert check_model(table.model, model) == []
    model.model.diffusion_model = network
    for weight in model.model.diffusion_model.parameters():
        weight.mul_(1.05)
    assert "another checkpoint" in " ".join(check_model(table.model, model))


@pytest.mark.parametrize("name", ["eps", "flow", "pictures"])
def test_a_table_that_the_command_line_has_made_is_for_the_demo_node(name, pack, run_node):
    """The shipped ones are, too."""
    from dode_nodes.hosts.comfy.model_facts import check_model

    model = (
        run_node(pack.DemoPictures) if name == "pictures" else run_node(pack.DemoModel, kind=name, digit=3)
    )[0]
    facts = load_model(name).facts
    assert check_model(facts, model) == []
    assert LambdaTable.load(REPOSITORY / "lambdas" / f"demo_{name}.safetensors").model == facts
    model.model.diffusion_model = copy.deepcopy(model.model.diffusion_model)  # the cached one stays as it is
    for weight in model.model.diffusion_model.parameters():
        weight.mul_(1.05)
    assert "another checkpoint" in " ".join(check_model(facts, model))


def test_a_familys_old_name_is_still_its_name():
    from comfy.supported_models import SD15

    from dode_nodes.hosts.comfy.model_facts import check_model, model_facts

    model = real(SD15, UNET)
    facts = model_facts(model)
    assert facts["family"] == "sd15"
    assert check_model(facts | {"family": "SD15"}, model) == check_model(facts, model) == []
    with pytest.raises(DodeError, match="its family is 'sdxl', this model's is 'sd15'"):
        check_model(facts | {"family": "SDXL"}, model)


def test_a_model_that_starts_from_pure_noise_is_told_from_plain_v():
    """Zero terminal SNR: the same network and prediction, and another σ to begin with."""
    from comfy.supported_models import SD15

    from dode_nodes.hosts.comfy.model_facts import check_model, model_facts
    from tests.hosts.comfy.cases.subjects import stock_node

    model = real(SD15, UNET)
    plain, zero = (
        stock_node(
            "nodes_model_advanced", "ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=zsnr
        )
        for zsnr in (False, True)
    )
    assert check_model(model_facts(plain), plain) == check_model(model_facts(zero), zero) == []
    (one_line,) = check_model(model_facts(zero), plain)
    assert one_line.startswith("the λ table was made for σ from 4")
    assert "this model's go from 14.6146 to 0.0291672" in one_line
    (back,) = check_model(model_facts(plain), zero)
    assert back.startswith("the λ table was made for σ from 14.6146 to 0.0291672")


def test_another_shift_is_remarked_once_and_an_end_that_is_not_known_never(make_model):
    from dode_nodes.hosts.comfy.model_facts import check_model, model_facts

    model = make_model("FLOW")
    facts = model_facts(model)
    (one_line,) = check_model(facts | {"shift": 3.0, "sigma_min": 0.003}, model)
    assert "shift 3" in one_line
    for end in ("sigma_min", "sigma_max"):
        assert check_model(facts | {"shift": None, end: None}, model) == []
        assert check_model({key: facts[key] for key in facts if key not in ("shift", end)}, model) == []
    assert check_model(facts | {"sigma_max": facts["sigma_max"] * 1.001}, model) == []
