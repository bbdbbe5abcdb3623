"""One checkpoint in every layout and number format has one fingerprint; others have others."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from dode_nodes.tables.fingerprint import fingerprint, same_checkpoint
from dode_nodes.tables.table import LambdaTable
from tests.tables.rows import row_of

FORMATS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
WIDTH = 64


def network(seed=0, blocks=40):
    """Weights by name, as of a transformer behind convolutions: of many scales, with biases and norms."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def add(name, *shape, around=0.0):
        scale = 0.01 * float(torch.randint(1, 9, (1,), generator=generator))
        weights[name] = around + scale * torch.randn(shape, generator=generator)

    add("in", WIDTH, 4, 3, 3)
    for i in range(blocks):
        add(f"{i}.norm", WIDTH, around=1.0)
        for part in ("q", "k", "v", "out"):
            add(f"{i}.{part}", WIDTH, WIDTH)
            add(f"{i}.{part}.bias", WIDTH)
        add(f"{i}.up", 4 * WIDTH, WIDTH)
        add(f"{i}.down", WIDTH, 4 * WIDTH)
    add("last.modulation", 2 * WIDTH, WIDTH)
    return weights


def of(weights, *formats):
    """The fingerprint of weights that have been rounded to one format after the other."""
    for name in formats:
        weights = {key: weight.to(FORMATS[name]) for key, weight in weights.items()}
    return fingerprint(weights.values())


def joined(weights):
    """Another layout: other names, in another order, q, k and v of one matrix, halves swapped, 1×1 convolutions."""
    blocks = {name.split(".")[0] for name in weights if name.endswith(".q")}
    other = {}
    for i in sorted(blocks, reverse=True):
        for end in ("", ".bias"):
            other[f"block{i}.qkv{end}"] = torch.cat([weights[f"{i}.{part}{end}"] for part in "qkv"])
            other[f"block{i}.proj{end}"] = weights[f"{i}.out{end}"]
        other[f"block{i}.proj"] = other[f"block{i}.proj"][..., None, None]
        other[f"block{i}.scale"] = weights[f"{i}.norm"]
        other[f"block{i}.mlp"] = weights[f"{i}.up"]
        other[f"block{i}.mlp2"] = weights[f"{i}.down"]
    other["first"] = weights["in"].contiguous(memory_format=torch.channels_last)
    shift, scale = weights["last.modulation"].chunk(2)
    other["final"] = torch.cat([scale, shift])
    return other


def moved(weights, share):
    """Weights moved at random by a share of each."""
    generator = torch.Generator().manual_seed(9)
    return {
        name: weight * (1 + share * torch.randn(weight.shape, generator=generator))
        for name, weight in weights.items()
    }


@pytest.mark.parametrize("blocks", [2, 40], ids=["few weights", "many weights"])
@pytest.mark.parametrize(("a", "b"), list(itertools.combinations_with_replacement(FORMATS, 2)))
def test_one_checkpoint_in_two_formats_and_layouts(a, b, blocks):
    weights = network(blocks=blocks)
    for x, y in ((of(weights, a), of(joined(weights), b)), (of(joined(weights), a), of(weights, b))):
        assert same_checkpoint(x, y) is same_checkpoint(y, x) is True


@pytest.mark.parametrize(("a", "b"), list(itertools.product(FORMATS, FORMATS)))
def test_another_seed_is_another_checkpoint(a, b):
    assert same_checkpoint(of(network(), a), of(network(seed=1), b)) is False


@pytest.mark.parametrize(
    ("a", "b"), [each for each in itertools.product(FORMATS, FORMATS) if {*each} != {"e4m3", "e5m2"}]
)
def test_weights_moved_by_one_percent_are_another_checkpoint(a, b):
    """Between the two kinds of fp8 nothing can be seen of it: all that rounds apart rounds apart unmoved, too."""
    weights = network()
    assert same_checkpoint(of(weights, a), of(moved(weights, 0.01), b)) is False


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (("e4m3", "fp16"), ("fp32",)),  # an fp8 file, loaded as fp16
        (("e5m2", "bf16"), ("fp16",)),
        (("fp16", "e4m3"), ("fp32",)),  # rounded twice
        (("bf16", "e4m3"), ("e4m3",)),
        (("bf16", "fp32"), ("fp16",)),
    ],
    ids=str,
)
def test_formats_that_weights_went_through_before(a, b):
    assert same_checkpoint(of(network(), *a), of(network(), *b)) is True


def test_a_lora_merged_into_the_attention_alone_makes_another_checkpoint():
    merged = {
        name: changed if name.split(".")[-1] in ("q", "k", "v", "out") else weight
        for (name, weight), changed in zip(network().items(), moved(network(), 0.01).values(), strict=True)
    }
    assert same_checkpoint(of(network()), of(merged)) is False


def test_what_cannot_be_read_is_left_out():
    """Weights without values, and of classes of their own; here all but the norms and biases."""

    class Quantised(torch.Tensor):
        pass

    weights = network()
    unread = {
        name: weight.to("meta") if weight.ndim == 4 else torch.randn(weight.shape).as_subclass(Quantised)
        for name, weight in weights.items()
        if weight.ndim > 1
    }
    whole = {"4 bits": torch.zeros(64, 64, dtype=torch.uint8), "a scale": torch.ones(())}
    partly = fingerprint((weights | unread | whole).values())
    assert same_checkpoint(partly, of(weights)) is True
    assert same_checkpoint(partly, of(weights, "e4m3")) is True
    assert same_checkpoint(partly, partly) is True
    assert same_checkpoint(partly, of(network(seed=1))) is False


@pytest.mark.parametrize(
    "weights",
    [
        [],
        [torch.zeros(64, 64)],
        [torch.ones(64)],
        [torch.full((64, 64), torch.nan)],
        [torch.randn(5)],
        [torch.randn(64, 64, device="meta")],
        [torch.empty(0, 64)],
    ],
    ids=["none", "zeros", "ones", "NaN", "few", "meta", "empty"],
)
def test_weights_that_say_nothing_give_no_fingerprint(weights):
    assert fingerprint(weights) == {}
    for other in ({}, of(network()), {"samples": []}, {"samples": [[0.5] * 16]}):
        assert same_checkpoint(fingerprint(weights), other) is None
        assert same_checkpoint(other, fingerprint(weights)) is None


def test_of_each_square_block_64_bytes_are_read(monkeypatch):
    """Or a checkpoint that lies on a disk would be read from there."""
    read = 0
    as_float = torch.Tensor.float

    def counted(tensor):
        nonlocal read
        read += tensor.numel()
        return as_float(tensor)

    monkeypatch.setattr(torch.Tensor, "float", counted)
    fingerprint([torch.randn(3 * WIDTH, WIDTH), torch.randn(WIDTH, WIDTH, 3, 3), torch.randn(WIDTH)])
    assert read == (3 + 1 + 1) * 16


def test_a_table_keeps_it(tmp_path):
    """Every number as it was; 128 samples at most, however large the network."""
    kept = of(network(blocks=200))
    assert 32 <= len(kept["samples"]) <= 128
    assert len(json.dumps(kept)) < 40_000
    path = LambdaTable([row_of()], model={"fingerprint": kept}).save(tmp_path / "table.safetensors")
    loaded = LambdaTable.load(path).model["fingerprint"]
    assert loaded == kept
    assert same_checkpoint(loaded, of(network(blocks=200))) is True


def test_a_fingerprint_from_a_stranger_is_only_compared():
    """Whatever its numbers; and without the note how samples were chosen."""
    mine = of(network())
    for number in (0, 1, -(2**62), 1e308, 1e-320):
        stranger = {"samples": [[number, *range(15)]] * 1000, "ascending": 2**60}
        assert same_checkpoint(stranger, mine) in (False, None)
    assert same_checkpoint({"samples": mine["samples"]}, mine) is True
