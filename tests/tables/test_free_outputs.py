"""Outputs that cost no evaluation, as a file has them: what is no Gaussian prior is refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from dode_nodes.errors import DodeError
from dode_nodes.tables.free_outputs import FIRST, GAUSSIAN, START, FreeOutputs, GaussianPrior


def flat(channels: int = 2, knots: int = 3) -> np.ndarray:
    return np.stack([np.eye(channels)] * knots)


def with_entry(at: tuple[int, ...], value: float) -> np.ndarray:
    spectrum = flat()
    spectrum[at] = value
    return spectrum


@pytest.mark.parametrize(("channels", "knots"), [(1, 2), (2, 64), (256, 2)])
def test_a_prior_has_up_to_so_many_channels_and_knots(channels, knots):
    prior = GaussianPrior(np.zeros(channels), flat(channels, knots))
    assert prior.spectrum.shape == (knots, channels, channels)


CHANNELS = "a Gaussian prior needs a mean for each channel"
COVARIANCE = "a Gaussian prior's spectrum must be symmetric, with no negative variance"


@pytest.mark.parametrize(
    ("mean", "spectrum", "why"),
    [
        (np.zeros(0), flat(0), CHANNELS),
        (np.zeros(257), flat(257, 2), CHANNELS),
        (np.zeros(()), flat(1), CHANNELS),
        (np.zeros((2, 2)), flat(), CHANNELS),
        ([math.nan, 0.0], flat(), "a Gaussian prior's mean has NaN"),
        ([70_000.0, 0.0], flat(), "a Gaussian prior's mean must have numbers of at most 65,504"),
        (np.zeros(3), flat(), "a spectrum of shape (3, 2, 2) does not fit 3 channels"),
        (np.zeros(2), np.eye(2), "a spectrum of shape (2, 2) does not fit 2 channels"),
        (np.zeros(2), flat()[:, :, :1], "a spectrum of shape (3, 2, 1) does not fit"),
        (np.zeros(2), flat(2, 1), "a spectrum of shape (1, 2, 2) does not fit"),
        (np.zeros(2), flat(2, 65), "a spectrum of shape (65, 2, 2) does not fit"),
        (np.zeros(2), with_entry((0, 0, 0), math.inf), "a Gaussian prior's spectrum has NaN or infinite"),
        (np.zeros(2), 70_000 * flat(), "a Gaussian prior's spectrum must have numbers of at most 65,504"),
        (np.zeros(2), with_entry((2, 0, 1), 0.5), COVARIANCE),
        (np.zeros(2), with_entry((1, 1, 1), -0.5), COVARIANCE),
    ],
    ids=str,
)
def test_what_is_no_prior_is_refused(mean, spectrum, why):
    with pytest.raises(DodeError, match=re.escape(why)):
        GaussianPrior(mean, spectrum)


def test_rounding_is_no_negative_variance():
    GaussianPrior(np.zeros(2), with_entry((1, 1, 1), -1e-12))


def test_numbers_for_which_lapack_finds_no_end_are_refused(monkeypatch):
    def fails(plane):
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(np.linalg, "eigvalsh", fails)
    with pytest.raises(DodeError, match=COVARIANCE):
        GaussianPrior(np.zeros(2), flat())


def test_a_prior_is_detached_and_cannot_be_changed():
    mean, spectrum = np.zeros(2), flat()
    prior = GaussianPrior(mean, spectrum)
    mean[0] = spectrum[0, 0, 0] = 9.0
    assert prior.mean.tolist() == [0.0, 0.0]
    assert np.array_equal(prior.spectrum, flat())
    for array in (prior.mean, prior.spectrum):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0


@pytest.mark.parametrize("requires", [[], [FIRST], [START], [FIRST, START, GAUSSIAN], [GAUSSIAN]], ids=str)
def test_what_a_reader_must_know_is_read_again(requires):
    arrays = {"mean": np.ones(2), "spectrum": flat()} if GAUSSIAN in requires else {}
    free = FreeOutputs.read(requires, arrays)
    assert free.requires == requires
    assert free.columns == (START in requires) + (GAUSSIAN in requires)
    assert free.arrays.keys() == arrays.keys()
    assert all(np.array_equal(free.arrays[name], array) for name, array in arrays.items())


@pytest.mark.parametrize("lacking", ["mean", "spectrum"])
def test_a_priors_missing_numbers_are_named(lacking):
    arrays = {"mean": np.ones(2), "spectrum": flat()}
    del arrays[lacking]
    with pytest.raises(DodeError, match=f"it lacks {lacking}"):
        FreeOutputs.read(["history", GAUSSIAN], arrays)
