"""Whether a table is for a model: families, and fingerprints that survive patches and number formats."""

from __future__ import annotations

import pytest
import torch

from dode_nodes import DodeError
from tests.hosts.comfy.node_calls import empty, zero_table

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


def test_fingerprint_ignores_patches_and_number_format(make_model):
    from dode_nodes.hosts.comfy.fingerprint import fingerprint, same_checkpoint
    from dode_nodes.hosts.comfy.model_facts import model_facts

    with torch.inference_mode(False):
        model = make_model()
        original = fingerprint(model)
        weight = "diffusion_model.weight"
        patched = model.clone()
        patched.add_patches({weight: (torch.ones(16, 16),)}, 0.5)
        patched.patch_model(torch.device("cpu"))
        try:
            assert same_checkpoint(fingerprint(patched), original)
            assert model_facts(patched)["patches"] == {"weights": 1, "strengths": [0.5]}
        finally:
            patched.unpatch_model(torch.device("cpu"))
        model.model.diffusion_model.to(torch.bfloat16)
        assert same_checkpoint(fingerprint(model), original)
    assert same_checkpoint(fingerprint(make_model()), original) is False
