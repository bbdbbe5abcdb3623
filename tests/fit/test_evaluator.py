"""The evaluator: the one that counts, tells, and stops at a wrong answer."""

from __future__ import annotations

import pytest
import torch

from dode_nodes import DodeError, Group, Latents, Progress
from dode_nodes.fit.evaluator import Evaluator
from tests.oracles import two_peaks
from tests.toys import Counting, Telling, latents


def test_evaluator_counts_latents_and_tells():
    told = Telling()
    work = Progress(22, told)
    before, evaluated = work.split(10, 12)
    with before:
        before.advance(10, "teacher", torch.zeros(1))
    evaluator = Evaluator(evaluated)
    for batch in Latents([Group(two_peaks, latents(size)) for size in (3, 2)]).batches():
        evaluator.on(batch, "student")(batch.x, torch.full((len(batch.x),), 2.0))
    assert told[1:] == [("student", 13, 22, (3, 2, 3, 3)), ("student", 15, 22, (2, 2, 3, 3))]
    assert evaluator.spent() == 5


def test_evaluator_lends_the_models_attributes():
    model = Counting()
    (batch,) = Latents.of(model, latents(2)).batches()
    assert Evaluator(Progress(2)).on(batch, "teacher").inner_model is model.inner_model


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda x: x * float("nan"), r"NaN or infinite values at σ = 2 \(teacher\).* fp32 or bf16"),
        (lambda x: x / 0, "NaN or infinite"),
        (lambda x: x[:1], r"must return the denoised latents, \(2, 2, 3, 3\); it returned \(1, 2, 3, 3\)"),
        (lambda x: (x, None), "it returned tuple"),
    ],
)
def test_wrong_answer_of_a_model_is_told(answer, why):
    told = Telling()
    evaluator = Evaluator(Progress(2, told))
    (batch,) = Latents.of(lambda x, sigma: answer(x), latents(2)).batches()
    with pytest.raises(DodeError, match=why):
        evaluator.on(batch, "teacher")(batch.x, torch.full((2,), 2.0))
    assert told == []
    assert evaluator.spent() == 0
