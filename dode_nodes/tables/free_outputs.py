"""What a row may weigh besides the network's outputs: outputs that cost no evaluation, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import DodeError
from . import gate

FIRST, START, GAUSSIAN = "afs", "x_T", "gaussian-denoiser"
"""As a row requires them."""
ARRAYS = ("mean", "spectrum")
"""Of a Gaussian prior, as a file names them."""

_MOST_CHANNELS = 256
_MOST_KNOTS = 64


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Pictures' latents as if they were Gaussian and looked alike everywhere: a mean and a radial spectrum.

    Attributes:
        mean: of each channel, ``[C]``.
        spectrum: the channels' covariance per radial frequency, ``[K, C, C]``, positive semidefinite: of the
            orthonormal Fourier transform, at the frequencies (i/(K − 1))² of the highest on the grid.
    """

    mean: np.ndarray
    spectrum: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", gate.numbers(self.mean, "a Gaussian prior's mean"))
        object.__setattr__(self, "spectrum", gate.numbers(self.spectrum, "a Gaussian prior's spectrum"))
        channels, shape = len(self.mean) if self.mean.ndim == 1 else 0, self.spectrum.shape
        if not 1 <= channels <= _MOST_CHANNELS:
            raise DodeError("a Gaussian prior needs a mean for each channel")
        if shape[1:] != (channels, channels) or not 2 <= shape[0] <= _MOST_KNOTS:
            raise DodeError(f"a spectrum of shape {shape} does not fit {channels} channels")
        gate.check_size(self.mean, "a Gaussian prior's mean")
        gate.check_size(self.spectrum, "a Gaussian prior's spectrum")
        scale = np.abs(self.spectrum).max(initial=0)
        if not all(_is_covariance(plane, scale) for plane in self.spectrum):  # one at a time: they are large
            raise DodeError("a Gaussian prior's spectrum must be symmetric, with no negative variance")


def _is_covariance(plane: np.ndarray, scale: float) -> bool:
    if not np.allclose(plane, plane.T, rtol=1e-9, atol=0):
        return False
    try:
        return bool(np.linalg.eigvalsh(plane).min() >= -1e-9 * scale)
    except np.linalg.LinAlgError:  # finite numbers for which LAPACK finds no end
        return False


@dataclass(frozen=True, eq=False)
class FreeOutputs:
    """Which outputs of a run cost no evaluation of the network.

    Attributes:
        first: the first of a run's outputs is one of them (the analytic first step, AFS: Dockhorn et al. 2022,
            arXiv:2210.05475): the Gaussian denoiser's if there is one, else the start.
        start: the state that the run begins with, at unit variance, can be weighed at every evaluation.
        gaussian: so can the output of the ideal denoiser of this prior, at the state that is evaluated.
    """

    first: bool = False
    start: bool = False
    gaussian: GaussianPrior | None = None

    @property
    def columns(self) -> int:
        """Those that have weights of their own, F; ``first`` has the weight of the output it stands for."""
        return int(self.start) + (self.gaussian is not None)

    @property
    def requires(self) -> list[str]:
        """What a reader must know."""
        there = {FIRST: self.first, START: self.start, GAUSSIAN: self.gaussian is not None}
        return [name for name, yes in there.items() if yes]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Of the Gaussian prior, if there is one."""
        return {} if self.gaussian is None else {name: getattr(self.gaussian, name) for name in ARRAYS}

    @classmethod
    def read(cls, requires: list[str], arrays: Mapping[str, np.ndarray]) -> FreeOutputs:
        """The inverse of ``requires`` and ``arrays``.

        Raises:
            DodeError: the Gaussian denoiser's numbers are missing or invalid.
        """
        prior = None
        if GAUSSIAN in requires:
            if missing := set(ARRAYS) - arrays.keys():
                raise DodeError(f"it lacks {', '.join(sorted(missing))}")
            prior = GaussianPrior(*(arrays[name] for name in ARRAYS))
        return cls(FIRST in requires, START in requires, prior)


NONE = FreeOutputs()
