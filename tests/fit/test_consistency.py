"""The check of a model: what is no function of its state is refused, and all that is passes, at a known cost."""

from __future__ import annotations

import pytest
import torch

from dode_nodes import DodeError, Group, Latents, Progress
from dode_nodes.fit.consistency import check_consistency, consistency_cost
from tests.oracles import Gaussian, two_peaks
from tests.toys import Counting, Telling, latents


def check(of, dtype=torch.float64, told=None, **kwargs):
    check_consistency(of, 2.0, dtype, Progress(consistency_cost(of), told), **kwargs)


@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize("model", [two_peaks, Gaussian(flow=False)])
def test_a_function_passes_and_costs_what_is_said(model, size):
    counting, told = Counting(model), Telling()
    groups = [
        Group(counting, latents(5)),
        Group(counting, latents(1, 1, 4)),
        Group(counting, latents(4, 2, 4, 6)),
    ]
    subject = Latents(groups, size)
    check(subject, told=told)
    assert told[0].total == consistency_cost(subject)
    assert told[-1].done == told[-1].total == counting.evaluations
    assert max(counting.batches) == (1 if size == 1 else 2)


class Cached:
    """From the third step of a run on, it gives every other answer again, as caches do that watch small changes."""

    def __init__(self):
        self.step, self.sigma, self.last = 0, 0.0, None

    def __call__(self, x, sigma):
        begins = float(sigma[0]) >= self.sigma
        self.step, self.sigma = 1 if begins else self.step + 1, float(sigma[0])
        if self.step < 3 or self.step % 2 == 0:
            self.last = two_peaks(x, sigma)
        return self.last


class Momentum:
    """Goes on a little in the direction that it came from."""

    def __init__(self):
        self.last = None

    def __call__(self, x, sigma):
        now = two_peaks(x, sigma)
        before = now if self.last is None or self.last.shape != x.shape else self.last
        self.last = now
        return now + 0.01 * (now - before)


@pytest.mark.parametrize("kind", [Cached, Momentum])
def test_what_remembers_is_refused(kind):
    with pytest.raises(DodeError, match=r"remove the cache of earlier steps .*from the model \(EasyCache\)"):
        check(Latents.of(kind(), latents(4)), suspects="EasyCache")
    good = Group(two_peaks, latents(4))
    with pytest.raises(DodeError, match=r"remove the cache of earlier steps .*from the model:"):
        check(Latents([good, Group(kind(), latents(4))]))


def test_what_counts_the_steps_of_a_run_is_refused():
    """As guidance that ends after some evaluations does; fits go on in the middle of runs."""

    class Counting:
        evaluated = 0

        def around(self, sample, indices, sigmas):
            self.evaluated = 0
            return sample({})

        def __call__(self, x, sigma):
            self.evaluated += 1
            return two_peaks(x, sigma) * (1 if self.evaluated < 4 else 0.9)

    counting = Counting()
    with pytest.raises(
        DodeError, match=r"use other guidance to distil \(Mine\): .* begins many runs in the middle"
    ):
        check(Latents([Group(counting, latents(4), around=counting.around)]), suspects="Mine")
    counting.skip_evaluation = lambda x, sigma: setattr(counting, "evaluated", counting.evaluated + 1)
    check(Latents([Group(counting, latents(4), around=counting.around)]))


def mixing(share, dtype=torch.float64):
    def model(x, sigma):
        denoised = two_peaks(x.double(), sigma.double())
        return (denoised + share * (denoised.mean(0) - denoised)).to(dtype)

    return model


def test_what_mixes_a_batch_is_refused_but_for_one_latent_at_a_time():
    with pytest.raises(DodeError, match="set micro_batch to 1"):
        check(Latents.of(mixing(0.1), latents(4)))
    check(Latents.of(mixing(0.1), latents(4), micro_batch=1))
    check(Latents.of(mixing(0.1), latents(1)))


def test_what_mixes_all_but_the_first_is_refused():
    """As guidance that grows along a video does."""

    def growing(x, sigma):
        share = torch.linspace(0, 0.1, len(x), dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return (1 + share) * two_peaks(x, sigma)

    with pytest.raises(DodeError, match="set micro_batch to 1"):
        check(Latents.of(growing, latents(4)))
    check(Latents.of(growing, latents(4), micro_batch=1))


@pytest.mark.parametrize("kind", [RuntimeError, IndexError])
def test_what_fails_on_a_batch_is_refused_but_for_one_latent_at_a_time(kind):
    def for_one(x, sigma):
        if len(x) > 1:
            raise kind("the size of tensor a (6) must match")
        return two_peaks(x, sigma)

    def broken(x, sigma):
        raise RuntimeError("it is broken")

    with pytest.raises(DodeError, match=r"set micro_batch to 1: .*must match"):
        check(Latents.of(for_one, latents(4)))
    check(Latents.of(for_one, latents(4), micro_batch=1))
    with pytest.raises(RuntimeError, match="it is broken"):
        check(Latents.of(broken, latents(4)))


def test_rounding_that_differs_between_batches_is_no_mixing():
    """A network in half precision takes other paths for other batches."""
    x = latents(4)
    check(Latents.of(mixing(1e-3, torch.float16), x.half()), torch.float16)
    check(Latents.of(mixing(1e-6, torch.float32), x.float()), torch.float32)
    with pytest.raises(DodeError, match="set micro_batch to 1"):
        check(Latents.of(mixing(1e-2, torch.float32), x.float()), torch.float32)
