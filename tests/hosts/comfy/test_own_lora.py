"""The LoRA of a row's own in the real ComfyUI: it does there what it did in training, and is known again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dode_nodes import LambdaRow, LambdaTable, sample_dode
from dode_nodes.demo.models import load_demo_model
from dode_nodes.fit.low_rank import LowRank
from dode_nodes.tables.lora_file import Factors, content_hash, write_lora
from dode_nodes.tables.provenance import TrainedLora

pytestmark = pytest.mark.comfyui

STRENGTH = 0.75
LABELS = torch.arange(2)


def learned(seed: int) -> tuple[LowRank, Any, dict[str, Factors]]:
    """Adapters as if they had learned something, the model that they are on, and their numbers by ComfyUI's names."""
    model = load_demo_model("eps")
    adapters = LowRank(model.network, 3, seed)
    with torch.no_grad():
        for i, parameter in enumerate(adapters.parameters()):
            parameter.copy_(
                0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i + seed))
            )
            parameter.copy_(parameter.half())  # as files have it
    adapters.strength = STRENGTH
    return adapters, model, {f"network.{name}": each for name, each in adapters.factors().items()}


def a_row(content: str) -> LambdaRow:
    sigmas = load_demo_model("eps").make_sigmas("karras", 3, False).double().numpy()
    trained = TrainedLora(content, STRENGTH, 0.1, 0.2, 4, "mine.safetensors")
    return LambdaRow("euler", sigmas, (1,) * 3, np.array([0, 0.1, 0.2]), trained_lora=trained)


@pytest.fixture
def loras(pack: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's folder of LoRAs and of outputs."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path


def load(model: Any, name: str, strength: float = STRENGTH) -> Any:
    """ComfyUI's own Load LoRA."""
    import nodes

    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, strength)[0]


def test_it_does_in_comfyui_what_it_did_in_training(loras: Path) -> None:
    import comfy.samplers

    from dode_nodes.hosts.comfy.digits import class_conditioning, demo_patcher, unconditional
    from dode_nodes.hosts.comfy.run_row import row_sampler

    _, model, factors = learned(0)
    row = a_row(content_hash(factors))
    x, sigmas = model.noise([1, 2]), torch.tensor(row.sigmas, dtype=torch.float32)
    expected = sample_dode(model.denoiser(2.0), x, sigmas, {"labels": torch.tensor([3, 3])}, row=row)

    patcher = load(demo_patcher("eps"), write_lora(loras / "mine.safetensors", factors).name)
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(class_conditioning(3), unconditional())
    guider.set_cfg(2.0)
    noise = x / float((1 + model.sigma_max**2) ** 0.5)
    format_ = patcher.model.latent_format
    found = format_.process_in(
        guider.sample(noise, torch.zeros_like(noise), row_sampler(lambda _: row), sigmas, disable_pbar=True)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)  # hosts round σ to a table of 1000
    alone = sample_dode(
        load_demo_model("eps").denoiser(2.0), x, sigmas, {"labels": torch.tensor([3, 3])}, row=row
    )
    assert (alone - expected).abs().max() > 0.1


def test_it_is_known_after_loading_saving_and_loading_and_beside_another(loras: Path, run_node: Any) -> None:
    import comfy.utils

    from dode_nodes.hosts.comfy.digits import demo_patcher
    from dode_nodes.hosts.comfy.own_lora import loras_on

    one, other = learned(0)[2], learned(9)[2]
    write_lora(loras / "one.safetensors", one)
    write_lora(loras / "other.safetensors", other)
    both = load(load(demo_patcher("eps"), "one.safetensors"), "other.safetensors", -0.5)
    assert loras_on(both) == {content_hash(one): [STRENGTH], content_hash(other): [-0.5]}

    saver = pytest.importorskip("comfy_extras.nodes_train").SaveLoRA
    state = comfy.utils.load_torch_file(str(loras / "one.safetensors"))
    if hasattr(saver, "save"):
        saver().save(state, "again")
    else:
        run_node(saver, lora=state, prefix="again")
    (again,) = loras.glob("again*.safetensors")
    assert loras_on(load(demo_patcher("eps"), again.name)) == {content_hash(one): [STRENGTH]}
    assert loras_on(demo_patcher("eps")) == {}


def test_the_sampler_says_when_it_is_not_on_the_model_as_it_was_trained(loras: Path) -> None:
    from dode_nodes.hosts.comfy.digits import demo_patcher
    from dode_nodes.hosts.comfy.own_lora import own_lora_remarks

    one, other = learned(0)[2], learned(9)[2]
    write_lora(loras / "one.safetensors", one)
    write_lora(loras / "other.safetensors", other)
    row, bare = a_row(content_hash(one)), demo_patcher("eps")
    on = load(bare, "one.safetensors")
    assert own_lora_remarks(row, on) == []
    assert own_lora_remarks(row, load(on, "other.safetensors")) == []
    assert own_lora_remarks(replace(row, trained_lora=None), bare) == []
    for model in (bare, load(bare, "other.safetensors")):
        (line,) = own_lora_remarks(row, model)
        assert "load the LoRA mine.safetensors" in line
        assert "at strength 0.75" in line
        assert "is not on the model" in line
    (line,) = own_lora_remarks(row, load(bare, "one.safetensors", 0.5))
    assert line.endswith("it is on at 0.5")
    (line,) = own_lora_remarks(row, load(on, "one.safetensors"))
    assert line.endswith("it is on at 0.75 and 0.75")
    bypassed = bare.clone()
    bypassed.set_injections("bypass_lora", [])
    (line,) = own_lora_remarks(row, bypassed)
    assert "could not check" in line


def test_both_ways_of_sampling_say_it(make_model: Any, dode: Any, caplog: pytest.LogCaptureFixture) -> None:
    from tests.hosts.comfy.node_calls import empty, ksampler

    model = make_model()
    table = dode.table(model)
    rows = [replace(row, trained_lora=TrainedLora("0" * 64, 1.0, 0.1, 0.2, 4, "mine")) for row in table.rows]
    table = LambdaTable(rows, model=table.model)
    for sample in (
        lambda: dode.ksampler(model, table, empty()),
        lambda: ksampler(dode.apply(model, table), empty()),
    ):
        caplog.clear()
        sample()
        assert "load the LoRA mine (00000000) at strength 1" in caplog.text
