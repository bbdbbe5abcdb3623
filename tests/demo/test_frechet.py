"""The Fréchet distance equals its closed forms and tells good samples from bad ones."""

from __future__ import annotations

import pytest
import torch

from dode_nodes.demo.frechet import digit_features, frechet_distance, frechet_distance_to_real
from dode_nodes.demo.models import load_classifier
from dode_nodes.demo.train import enlarge, load_digits
from dode_nodes.errors import DodeError


@pytest.fixture
def features():
    """(400, 6) with correlations."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    return torch.randn(400, 6, dtype=torch.float64, generator=generator) @ mixing


def test_a_set_has_no_distance_to_itself(features):
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_a_shift_counts_squared(features):
    shift = torch.arange(6.0)
    assert frechet_distance(features, features + shift) == pytest.approx(55)


def test_a_scale_counts_with_the_variance(features):
    centred = features - features.mean(0)
    expected = (3 - 1) ** 2 * centred.var(0).sum().item()
    assert frechet_distance(centred, 3 * centred) == pytest.approx(expected)


def test_covariances_that_do_not_commute():
    """For 2×2 matrices tr (AB)^½ = sqrt(tr AB + 2 sqrt(det AB))."""
    a = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -2.0], [-1.0, 2.0]], dtype=torch.float64)
    product = a.T.cov() @ b.T.cov()
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = a.var(0).sum() + b.var(0).sum() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected.item())


def test_it_is_symmetric_and_works_with_fewer_samples_than_features(features):
    few, other = features[:4], features[4:9]
    assert frechet_distance(few, other) == pytest.approx(frechet_distance(other, few))
    assert frechet_distance(few, other) > 0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (torch.zeros(5, 3), "widths"),
        (torch.zeros(1, 6), "samples"),
        (torch.zeros(6), "samples"),
        (torch.full((5, 6), torch.nan), "NaN"),
    ],
)
def test_unusable_features_are_refused(features, bad, reason):
    with pytest.raises(DodeError, match=reason):
        frechet_distance(features, bad)


def test_the_shipped_statistics_are_those_of_the_real_digits():
    pytest.importorskip("sklearn")
    images, labels = load_digits()
    features = digit_features(enlarge(images))
    assert frechet_distance_to_real(features) == pytest.approx(0, abs=1e-3)
    assert (load_classifier().head(features).argmax(1) == labels).float().mean() > 0.99


def test_worse_pictures_are_further_from_the_real_digits():
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    real = enlarge(load_digits()[0][:500])
    distances = [
        frechet_distance_to_real(
            digit_features((real + noise * torch.randn(real.shape, generator=generator)).clamp(0, 1))
        )
        for noise in (0, 0.1, 0.3, 1)
    ]
    assert distances == sorted(distances)
    assert distances[-1] > 10 * distances[0]
