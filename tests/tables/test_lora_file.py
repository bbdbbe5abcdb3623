"""LoRA files, and what a LoRA is known by."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from dode_nodes.errors import NameTaken, TableError
from dode_nodes.tables.lora_file import Factors, content_hash, factors_of, kohya_state, write_lora


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


FACTORS = {
    "middle.0.mix": Factors(normal(6, 3), normal(3, 5), 3.0),
    "enter": Factors(normal(8, 2, 1, 1), normal(2, 4, 3, 3), 1.0),
}


def state_of_diffusers(alpha: bool) -> dict[str, Tensor]:
    state = {}
    for name, (up, down, of) in FACTORS.items():
        state |= {f"unet.{name}.lora_B.weight": up, f"unet.{name}.lora_A.weight": down}
        if alpha:
            state[f"unet.{name}.alpha"] = torch.tensor(of)
    return state


def test_a_file_has_kohya_s_names_and_metadata(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "mine.safetensors", FACTORS)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "ss_network_module": "networks.lora", "ss_network_dim": "3", "ss_network_alpha": "3",
        }  # fmt: skip
        assert set(file.keys()) == {
            f"lora_unet_{name}.{part}"
            for name in ("middle_0_mix", "enter")
            for part in ("lora_up.weight", "lora_down.weight", "alpha")
        }
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118  # no dict


def test_what_is_written_is_read_and_merges_by_a_plain_product(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "mine.safetensors", FACTORS)
    state = safetensors.torch.load_file(path)
    for name, (up, down, alpha) in FACTORS.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        read_up, read_down = (
            state[f"{key}.lora_{part}.weight"].float().flatten(1) for part in ("up", "down")
        )
        merged = read_up @ read_down * state[f"{key}.alpha"].float() / len(read_down)
        expected = up.flatten(1) @ down.flatten(1) * alpha / len(down)
        assert torch.allclose(merged, expected, rtol=1e-2, atol=1e-2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_nothing_is_overwritten_and_nothing_useless_is_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    for value in (float("nan"), 1e6):
        with pytest.raises(TableError, match="finite"):
            write_lora(path, {"enter": FACTORS["enter"]._replace(up=torch.full((8, 2, 1, 1), value))})
        assert not path.exists()
    write_lora(path, FACTORS)
    before = path.read_bytes()
    with pytest.raises(NameTaken):
        write_lora(path, {"enter": FACTORS["enter"]})
    assert path.read_bytes() == before


def test_the_hash_outlives_files_names_order_and_float16() -> None:
    known = content_hash(FACTORS)
    kohya = kohya_state(FACTORS)
    in_comfyui = {
        key.replace("lora_unet_middle_0_", "diffusion_model.middle.0."): value for key, value in kohya.items()
    }
    for state in (kohya, in_comfyui, dict(reversed(kohya.items())), state_of_diffusers(alpha=True)):
        assert content_hash(factors_of(state)) == known
    patches = {f"diffusion_model.{name}.weight": each for name, each in FACTORS.items()}
    assert content_hash(patches) == known
    assert (
        content_hash({name: each._replace(up=each.up.half().float()) for name, each in FACTORS.items()})
        == known
    )


@pytest.mark.parametrize(
    "other",
    [
        {"enter": FACTORS["enter"]},
        {**FACTORS, "enter": FACTORS["enter"]._replace(up=1.01 * FACTORS["enter"].up)},
        {**FACTORS, "enter": FACTORS["enter"]._replace(down=-FACTORS["enter"].down)},
        {**FACTORS, "enter": FACTORS["enter"]._replace(alpha=2.0)},
        {"middle.1.mix": FACTORS["middle.0.mix"], "enter": FACTORS["enter"]},
    ],
)
def test_another_lora_has_another_hash(other: dict[str, Factors]) -> None:
    assert content_hash(other) != content_hash(FACTORS)


def test_without_an_alpha_it_is_the_rank() -> None:
    found = factors_of(state_of_diffusers(alpha=False))
    assert {each.alpha for each in found.values()} == {3.0, 2.0}


def test_what_is_no_low_rank_change_is_passed_over() -> None:
    state = {"unet.x.lora_A.weight": normal(2, 2), "unet.x.diff": normal(2), "y.alpha": torch.tensor(1.0)}
    assert factors_of(state) == {}
