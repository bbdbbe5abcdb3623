"""A recorded run can be replayed for other weights, and no run leaves a trace in another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dode_nodes import Group, Latents
from dode_nodes.fit.runs import Recording, Run
from dode_nodes.sampling.denoiser import DodeDenoiser, dode_corrections
from dode_nodes.sampling.probe import probe_student
from dode_nodes.sampling.solvers import SOLVERS, sample_euler
from tests.oracles import two_peaks
from tests.toys import Counting, catches_everything, karras, latents, writes_into_what_it_is_given

SIGMAS = karras(5)


def batch_of(model=two_peaks, count=3, extra_args=None):
    (batch,) = Latents.of(model, latents(count), extra_args=extra_args).batches()
    return batch


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("name", [*SOLVERS, "catches_everything"])
def test_replay_equals_a_run(name, prediction):
    """Weights found one after the other, each from replays, give the run that they give at once."""
    solver = SOLVERS.get(name, catches_everything)
    model = Counting()
    run, batch = Run(solver, SIGMAS), batch_of(model)
    n = len(probe_student(solver, SIGMAS).sigmas)
    corrections = dode_corrections(np.linspace(0.1, 0.6, n))
    recording = Recording(run, batch, prediction)
    nexts = []
    for k in range(n):
        so_far = np.where(np.arange(n)[:, None] <= k, corrections, 0)
        without = np.where(np.arange(n)[:, None] < k, corrections, 0)
        first = recording.evaluate(model, without)
        assert torch.equal(recording.next_state(without), first)
        nexts.append(recording.next_state(so_far))
    assert model.evaluations == 3 * n

    states, end = run.trajectory(DodeDenoiser(two_peaks, corrections, prediction), batch, range(n))
    assert torch.equal(nexts[-1], end)
    for k in range(n):
        assert torch.equal(recording.states[k], states[k])
        assert k == 0 or torch.equal(nexts[k - 1], states[k])
        sigma = states[k].new_full((3,), model.sigmas[k])
        assert torch.equal(recording.denoised[k], two_peaks(states[k], sigma))


def test_trajectory_gives_the_states_asked_for():
    x = latents(3)
    states, end = Run(sample_euler, SIGMAS).trajectory(two_peaks, batch_of(), [0, 2])
    assert states.keys() == {0, 2}
    assert torch.equal(states[0], x)
    assert torch.equal(states[2], sample_euler(two_peaks, x, SIGMAS[:3], disable=True))
    assert torch.equal(end, sample_euler(two_peaks, x, SIGMAS, disable=True))


def test_every_run_gets_fresh_arguments():
    """Of a sampler that writes into x, sigmas and extra_args, three runs are the same."""
    extra_args = {"seed": 3, "model_options": {"a": 1}}
    seen = []

    def model(x, sigma, seed, model_options):
        seen.append((seed, dict(model_options)))
        return two_peaks(x, sigma)

    batch = batch_of(model, extra_args=extra_args)
    before = batch.x.clone()
    run = Run(writes_into_what_it_is_given, SIGMAS.clone())
    first, second = run(model, batch), run(model, batch)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, sample_euler(two_peaks, latents(3), SIGMAS, disable=True))
    assert torch.equal(batch.x, before)
    assert torch.equal(run.sigmas, SIGMAS)
    assert extra_args == {"seed": 3, "model_options": {"a": 1}}
    assert seen == [(None, {})] * 10


def test_record_survives_a_sampler_that_writes_into_the_denoised():
    def in_place(model, x, sigmas, **kwargs):
        def denoise(x, sigma):
            return model(x, sigma).mul_(0.5)

        return sample_euler(denoise, x, sigmas, disable=True)

    recording = Recording(Run(in_place, SIGMAS), batch_of(), "data")
    zeros = np.zeros((5, 5))
    first = recording.evaluate(two_peaks, zeros)
    assert torch.equal(recording.next_state(zeros), first)
    assert torch.equal(recording.next_state(zeros), first)


def test_nothing_is_tracked_for_backpropagation():
    x = latents(2).requires_grad_()
    (batch,) = Latents.of(two_peaks, x).batches()

    def no_decorator(model, x, sigmas, extra_args, callback, disable):
        return x - (x - model(x, sigmas[:1].expand(len(x)))) / 2

    assert not Run(no_decorator, SIGMAS)(two_peaks, batch).requires_grad


def test_options_reach_the_sampler():
    x = latents(3)
    run = Run(SOLVERS["ipndm"], SIGMAS, {"max_order": 2})
    expected = SOLVERS["ipndm"](two_peaks, x, SIGMAS, disable=True, max_order=2)
    assert torch.equal(run(two_peaks, batch_of()), expected)


# --- What a host does around a run ----------------------------------------------------------------------


def test_a_host_is_asked_around_every_run_that_evaluates_its_model():
    """And around none that only replays."""
    seen = []

    def around(sample, indices, sigmas):
        seen.append((indices.tolist(), len(sigmas)))
        return sample({"seed": 7}) + 1

    def model(x, sigma, seed):
        assert seed == 7
        return two_peaks(x, sigma)

    _, batch = Latents([Group(model, latents(3), around=around)], 2).batches()
    run = Run(sample_euler, SIGMAS)
    x = latents(3)[2:]
    assert torch.equal(run(model, batch), sample_euler(two_peaks, x, SIGMAS, disable=True) + 1)
    recording = Recording(run, batch, "noise")
    for _ in range(5):
        recording.evaluate(model, np.zeros((5, 5)))
        recording.next_state(np.zeros((5, 5)))
    assert seen == [([2], 6)] * 6


def test_a_model_is_told_of_evaluations_that_are_skipped():
    """Such as one that counts steps."""
    model = Counting()
    model.skipped = []
    model.skip_evaluation = lambda x, sigma: model.skipped.append((x.clone(), float(sigma[0])))
    batch = batch_of(model)
    recording = Recording(Run(sample_euler, SIGMAS), batch, "noise")
    for k in range(5):
        model.skipped.clear()
        recording.evaluate(model, np.zeros((5, 5)))
        assert [sigma for _, sigma in model.skipped] == SIGMAS[:k].tolist()
        assert all(
            torch.equal(x, state) for (x, _), state in zip(model.skipped, recording.states, strict=False)
        )
