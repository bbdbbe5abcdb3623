"""Memory that runs out: half as many latents at a time from then on, and the same numbers."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from dode_nodes import DodeError, Group, Latents, Progress, Teacher, refine, run_teacher
from dode_nodes.fit.evaluator import Evaluator
from dode_nodes.fit.memory import BatchLimit, is_out_of_memory
from tests.oracles import two_peaks
from tests.toys import Counting, Telling, distilled, karras, latents


class Small(Counting):
    """A denoiser with memory for so many latents."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.refused = 0

    def __call__(self, x, sigma, **extra_args):
        if len(x) > self.room:
            self.refused += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nMore words")
        return super().__call__(x, sigma, **extra_args)


@pytest.mark.parametrize(("room", "sizes"), [(8, [8]), (4, [4, 4]), (3, [2, 2, 2, 2]), (1, [1] * 8)])
def test_half_as_many_latents_at_a_time_until_they_fit(room, sizes):
    model, told = Small(room), Telling()
    evaluator = Evaluator(Progress(16, told))
    (batch,) = Latents.of(model, latents(8)).batches()
    sigma = torch.linspace(1, 2, 8, dtype=torch.float64)
    asked = evaluator.on(batch, "teacher")
    first, again = asked(batch.x, sigma), asked(batch.x, sigma)
    assert torch.equal(first, two_peaks(batch.x, sigma))
    assert torch.equal(again, first)
    assert model.batches == sizes * 2  # the second time nothing is tried that did not fit
    assert [note.done for note in told] == np.cumsum(sizes * 2).tolist()
    assert evaluator.spent() == 16


def test_what_fits_is_known_to_all_of_a_fit():
    model = Small(3)
    of = Latents([Group(model, latents(4)), Group(model, latents(5, seed=1))])
    for batch in [*of.batches(), *of.batches(of.held_out)]:
        Evaluator(Progress(9)).on(batch, "teacher")(batch.x, torch.ones(len(batch.x)))
    assert model.refused == 1
    assert of.limit.size == 2


def test_a_latents_own_arguments_go_with_it():
    labels = torch.arange(5.0, dtype=torch.float64)

    def denoise(x, sigma, labels):
        if len(x) > 2:
            raise MemoryError
        return x + labels.reshape(-1, 1, 1, 1)

    (batch,) = Latents.of(denoise, latents(5), extra_args=lambda i: {"labels": labels[i]}).batches()
    answer = Evaluator(Progress(5)).on(batch, "teacher")(batch.x, torch.ones(5), **batch.extra_args())
    assert torch.equal(answer, batch.x + labels.reshape(-1, 1, 1, 1))


def test_one_latent_that_does_not_fit_is_an_error_of_ours():
    (batch,) = Latents.of(Small(0), latents(3)).batches()
    with pytest.raises(DodeError, match=r"make the latent smaller.* on one latent: CUDA out of memory.*GiB$"):
        Evaluator(Progress(3)).on(batch, "teacher")(batch.x, torch.ones(3))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("no words"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("Could not allocate tensor with 9 bytes. There is not enough GPU video memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_says_that_memory_has_run_out(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_devices_own_words():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert is_out_of_memory(raised.value)


def test_other_errors_pass():
    def ask(part):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        BatchLimit().evaluate(latents(4), ask)


def test_what_the_failed_attempt_held_is_free_before_the_next():
    held: list[weakref.ref] = []

    def ask(part):
        assert not any(ref() is not None for ref in held)
        activations = latents(1)
        held.append(weakref.ref(activations))
        if part.stop - part.start > 1:
            raise torch.cuda.OutOfMemoryError
        return torch.zeros(1)

    assert len(BatchLimit().evaluate(latents(4), ask)) == 4
    assert len(held) == 2 + 4


def test_a_fit_is_the_same_to_the_bit():
    x, sigmas = latents(8), karras(4)
    rows = []
    for room in (8, 3):
        of = Latents.of(Small(room), x)
        targets = run_teacher(of, sigmas, Teacher(scale=4))
        row = distilled(of, sigmas, teacher=Teacher(scale=4))
        rows += [row, refine(targets, row)]
    whole, refined, in_parts, refined_in_parts = rows
    assert np.array_equal(whole.weights, in_parts.weights)
    assert whole.errors == in_parts.errors
    assert np.array_equal(refined.weights, refined_in_parts.weights)
    assert np.array_equal(refined.sigmas, refined_in_parts.sigmas)
