"""The quality metric: Fréchet distance in the features of the demo's classifier (after Heusel et al. 2017,
arXiv:1706.08500). It depends on the number of samples: compare only results from the same number."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..errors import DodeError
from .models import load_classifier
from .networks import DigitClassifier


@torch.no_grad()
def digit_features(images: Tensor) -> Tensor:
    """(B, 64), float32, of images (B, 1, 16, 16) in [0, 1], by the embedded classifier."""
    return _classifier().features(images.to("cpu", torch.float32))


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features, (samples, features) each.

    |μ_a − μ_b|² + tr(C_a + C_b − 2 (C_a C_b)^½), in float64.

    Raises:
        DodeError: their widths differ, there are fewer than two samples, or NaN or infinities.
    """
    return _distance(*mean_and_covariance(features_a), *mean_and_covariance(features_b))


def frechet_distance_to_real(features: Tensor) -> float:
    """Fréchet distance between `features`, (samples, 64), and those of scikit-learn's 1797 enlarged digits.

    Raises:
        DodeError: as `frechet_distance`.
    """
    classifier = _classifier()
    return _distance(
        *mean_and_covariance(features), classifier.real_mean.double(), classifier.real_covariance.double()
    )


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (n,) and covariance (n, n) of features (samples, n), float64.

    Raises:
        DodeError: not a matrix with at least two rows, or with NaN or infinities.
    """
    if features.ndim != 2 or len(features) < 2:
        raise DodeError(f"features must be (samples, n) with samples ≥ 2, not {tuple(features.shape)}")
    if not features.isfinite().all():
        raise DodeError("there are NaN or infinities among the features")
    features = features.double()
    return features.mean(0), features.T.cov()


def _distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    if mean_a.shape != mean_b.shape:
        raise DodeError(f"the features have different widths, {len(mean_a)} and {len(mean_b)}")
    # tr (AB)^½ = tr (A^½ B A^½)^½, whose symmetric form needs no general matrix root and stays real.
    root_a = _root(covariance_a)
    cross = _root(root_a @ covariance_b @ root_a).trace()
    squared = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(float(squared), 0.0)  # rounding may leave −1e-15


def _root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return root


@functools.cache
def _classifier() -> DigitClassifier:
    return load_classifier()
