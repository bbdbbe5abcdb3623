"""Training writes complete, repeatable files, and varies digits only a little."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from dode_nodes.demo import train
from dode_nodes.demo.networks import DigitClassifier, DigitUNet
from dode_nodes.demo.train import enlarge, main, random_transforms


@pytest.mark.parametrize(
    ("name", "network"), [("eps", DigitUNet), ("flow", DigitUNet), ("classifier", DigitClassifier)]
)
def test_it_writes_weights_and_where_they_come_from(tmp_path, name, network):
    pytest.importorskip("sklearn")
    main([name, "--seed", "3", "--steps", "2", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.safetensors"]
    network().load_state_dict(load_file(tmp_path / f"{name}.safetensors"))
    with safe_open(tmp_path / f"{name}.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["seed"] == "3"
    assert metadata["command"] == f"python -m dode_nodes.demo.train {name} --seed 3 --steps 2"


def test_the_seed_decides_the_weights(tmp_path):
    pytest.importorskip("sklearn")
    files = []
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        main(["classifier", "--seed", seed, "--steps", "2", "--out", str(tmp_path / folder)])
        files.append(load_file(tmp_path / folder / "classifier.safetensors"))
    same, again, other = (file["head.weight"] for file in files)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_enlarged_digits_keep_their_place_and_brightness():
    images = torch.zeros(1, 1, 8, 8)
    images[..., 2, 5] = 1
    large = enlarge(images)
    assert large.shape == (1, 1, 16, 16)
    assert large.min() >= 0
    assert large.max() <= 1
    rows, columns = (large[0, 0] > 0.5).nonzero(as_tuple=True)
    assert rows.unique().tolist() == [4, 5]
    assert columns.unique().tolist() == [10, 11]
    even = enlarge(torch.full((1, 1, 8, 8), 0.5))
    torch.testing.assert_close(even[..., 4:12, 4:12], torch.full((1, 1, 8, 8), 0.5))


def test_variations_are_small():
    torch.manual_seed(0)
    transforms = random_transforms(1000)
    corner = transforms @ torch.tensor([1.0, 1.0, 1.0])
    moved = (corner - 1).norm(dim=1) * 8  # in pixels of the 16
    assert 0.5 < moved.mean() < 2


def test_an_interrupted_training_ends_as_if_it_had_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)

    def run(checkpoint=None, batches=7):
        """Train a little network for 7 steps, if there are batches enough."""
        torch.manual_seed(0)
        network, left = nn.Linear(3, 1), iter(range(batches))

        def loss():
            next(left)
            x = torch.randn(4, 3)
            return (network(x) - x.prod(dim=1, keepdim=True)).square().mean()

        last_loss = train.optimise(network, loss, 7, checkpoint=checkpoint)
        return network.weight, last_loss

    weight, last_loss = run()
    with pytest.raises(StopIteration):
        run(tmp_path / "checkpoints" / "network.pt", batches=5)
    again, last_loss_again = run(tmp_path / "checkpoints" / "network.pt", batches=3)
    assert torch.equal(weight, again)
    assert last_loss == last_loss_again
