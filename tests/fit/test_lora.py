"""Training a LoRA for a row: its gradients, what it keeps, and what ends it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dode_nodes import (
    DodeError,
    Group,
    LambdaRow,
    Latents,
    Targets,
    Teacher,
    distill,
    run_teacher,
    sample_dode,
)
from dode_nodes.fit.lora import STEP, LoraRecipe, LoraTraining, try_batch
from dode_nodes.fit.low_rank import LowRank
from dode_nodes.tables.free_outputs import FreeOutputs
from dode_nodes.tables.provenance import REFINED, Origin
from tests.toys import Interrupted, Telling, latents

SIGMAS = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
TRUE = 0.6
"""The factor by which the toy's denoiser should shrink x; it begins at 0.5."""


class Toy:
    """D(x, σ) = (0.5 + strength · θ) x, of which θ is learned: where NaN begins, there is none."""

    def __init__(self, nan_from: float = math.inf) -> None:
        self.strength = 1.0
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.nan_from = nan_from

    def parameters(self) -> list[nn.Parameter]:
        return [self.theta]

    def __call__(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        factor = 0.5 + self.strength * self.theta
        return x * torch.where(factor > 0.5 + self.nan_from, math.nan, factor)


def targets_for(toy: Toy, x: Tensor, sigmas: Tensor = SIGMAS) -> Targets:
    """The states of a teacher whose factor is the true one; the latents are the toy's."""
    true = run_teacher(
        Latents.of(lambda x, sigma: TRUE * x, x), sigmas, Teacher("euler", 1)
    )  # the student's own steps: there is a θ that reaches it exactly
    return replace(true, latents=Latents.of(toy, x))


def plain(sigmas: Tensor = SIGMAS, *lambdas: float) -> LambdaRow:
    steps = len(sigmas) - 1
    return LambdaRow("euler", sigmas.numpy(), (1,) * steps, lambdas or [0.0] * steps)


def gradients(toy: Toy, training: LoraTraining) -> list[float]:
    """Of θ, in all steps of Adam."""
    found: list[float] = []
    handle = toy.theta.register_hook(lambda gradient: found.append(float(gradient)))
    training.run()
    handle.remove()
    return found


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_gradient_through_all_steps_is_the_closed_form_s(checkpointing: bool) -> None:
    toy, x, weight = Toy(), latents(4, sigma=4.0), 0.3
    targets = targets_for(toy, x)
    recipe = LoraRecipe(1, batch=3, rate=1e-12, checkpointing=checkpointing)
    (found,) = gradients(toy, LoraTraining(targets, [plain(SIGMAS, 0.0, weight)], toy, recipe))

    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    start, end = x[targets.latents.fitted], targets.ends[0][targets.latents.fitted]
    factor = 0.5 + theta
    noise = (1 - factor) * start / 4
    middle = start - 3 * noise
    corrected = (1 - factor) * middle
    corrected = corrected + weight * (corrected - noise)
    (middle - corrected - end).abs().flatten(1).sum(1).mean().backward()
    assert found == pytest.approx(float(theta.grad), rel=1e-12)


def test_the_loss_per_step_has_no_gradient_from_step_to_step() -> None:
    toy, x = Toy(), latents(4, sigma=4.0)
    targets = targets_for(toy, x)
    recipe = LoraRecipe(1, batch=3, rate=1e-12, loss=STEP)
    found = gradients(toy, LoraTraining(targets, [plain()], toy, recipe))

    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    factor, expected, state = 0.5 + theta, [], x
    fitted = targets.latents.fitted
    for sigma, sigma_next in ((4.0, 1.0), (1.0, 0.0)):
        moved = state + (1 - factor) * state / sigma * (sigma_next - sigma)
        loss = (moved - targets.at(sigma_next)[0])[fitted].abs().flatten(1).sum(1).mean()
        expected.append(float(torch.autograd.grad(loss, theta, retain_graph=True)[0]))
        state = moved.detach()
    assert found == pytest.approx(expected, rel=1e-9)


def test_it_learns_what_the_teacher_knows_and_is_left_with_the_best() -> None:
    toy, telling = Toy(), Telling()
    training = LoraTraining(
        targets_for(toy, latents(8, sigma=4.0)), [plain()], toy, LoraRecipe(60, rate=1e-2)
    )
    best = training.run(telling)
    assert best.strength == toy.strength == 1.0
    assert best.errors[0] < 0.1 * training.errors_without[0]
    assert toy.theta.item() == best.numbers[0].item() == pytest.approx(TRUE - 0.5, abs=0.01)
    assert len(training.losses) == 60
    told = [note.stage for note in telling if "loss" in note.stage]
    assert told[0].endswith(f"loss {training.losses[0]:.3g}")
    assert told[-1].endswith(f"loss {sum(training.losses[-21:-1]) / 20:.3g}")
    assert training.losses[-1] < 0.2 * training.losses[0]


def test_the_strength_is_chosen_on_the_latents_held_out() -> None:
    """Trained towards twice as much as the held-out latents ask for, half of it is best."""
    toy, x = Toy(), latents(8, sigma=4.0)
    targets = targets_for(toy, x)
    twice = run_teacher(Latents.of(lambda x, sigma: (2 * TRUE - 0.5) * x, x), SIGMAS, Teacher("euler", 1))
    held = targets.latents.held_out
    ends = targets.ends[0].clone()
    ends[targets.latents.fitted] = twice.ends[0][targets.latents.fitted]
    assert not torch.equal(ends[held], twice.ends[0][held])
    mixed = replace(targets, states={**targets.states, 0.0: [ends]})
    best = LoraTraining(mixed, [plain()], toy, LoraRecipe(120, rate=3e-2)).run()
    assert toy.theta.item() == pytest.approx(2 * (TRUE - 0.5), abs=0.02)
    assert best.strength == toy.strength == 0.5


def test_a_lora_that_harms_is_left_at_strength_0() -> None:
    toy, x = Toy(), latents(8, sigma=4.0)
    targets = targets_for(toy, x)
    away = {**targets.states, 0.0: [targets.ends[0].clone()]}
    away[0.0][0][targets.latents.fitted] *= -1
    training = LoraTraining(replace(targets, states=away), [plain()], toy, LoraRecipe(20))
    best = training.run()
    assert best.strength == toy.strength == 0.0
    assert best.errors == training.errors_without


def test_what_is_not_finite_ends_it_with_the_last_numbers_that_were() -> None:
    toy = Toy(nan_from=0.02)
    targets = targets_for(toy, latents(8, sigma=4.0))
    training = LoraTraining(targets, [plain()], toy, LoraRecipe(60, rate=5e-3))
    best = training.run()
    assert training.stopped_at is not None
    assert len(training.losses) == training.stopped_at - 1
    assert 0 < toy.theta.item() <= 0.02
    assert best.errors[0] < training.errors_without[0]


def test_a_gradient_that_is_not_finite_ends_it_before_it_is_used() -> None:
    toy = Toy()
    toy.theta.register_hook(lambda gradient: gradient * math.inf)
    training = LoraTraining(targets_for(toy, latents(8, sigma=4.0)), [plain()], toy, LoraRecipe(8))
    training.run()
    assert training.stopped_at == 1
    assert toy.theta.item() == 0


def test_a_row_that_is_not_finite_by_itself_is_refused() -> None:
    toy = Toy(nan_from=-1.0)
    with pytest.raises(DodeError, match="without a LoRA"):
        LoraTraining(targets_for(toy, latents(8, sigma=4.0)), [plain()], toy, LoraRecipe(8)).run()


@pytest.mark.parametrize(("part", "kept"), [(0.1, False), (0.6, True)])
def test_ended_it_keeps_the_best_so_far(part: float, kept: bool) -> None:
    toy = Toy()
    training = LoraTraining(
        targets_for(toy, latents(8, sigma=4.0)), [plain()], toy, LoraRecipe(40, rate=1e-2)
    )

    def stop(progress: object) -> None:
        if progress.done > part * training.cost:  # type: ignore[attr-defined]
            raise Interrupted

    with pytest.raises(Interrupted):
        training.run(stop)
    assert toy.strength == training.best.strength == float(kept)
    assert toy.theta.item() == training.best.numbers[0].item()
    assert (training.best.errors[0] < training.errors_without[0]) == kept


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_cost_is_known_before(checkpointing: bool) -> None:
    toy, telling, shown = Toy(), Telling(), list[Tensor]()
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    targets = targets_for(toy, latents(8, sigma=4.0), sigmas)
    both = [plain(sigmas), plain(torch.tensor([4.0, 0.0], dtype=torch.float64))]
    recipe = LoraRecipe(10, batch=3, checkpointing=checkpointing)
    training = LoraTraining(targets, both, toy, recipe)
    training.run(lambda progress: telling(progress) or shown.append(progress.denoised))
    assert not any(denoised.requires_grad for denoised in shown)  # hosts draw them
    each = 4 if checkpointing else 3
    assert training.cost == recipe.cost(targets.latents, [3, 1])
    assert training.cost == 5 * 3 * each * (3 + 1) + 8 * 2 * (3 + 1)
    telling.check(training.cost, training.cost)


def test_latents_of_several_sizes_and_prompts_are_trained_on_with_their_own() -> None:
    toy = Toy()

    def prompted(x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        assert prompt.tolist() == x.flatten(1)[:, 0].tolist()
        return toy(x, sigma)

    parts = [latents(6, sigma=4.0), latents(6, 2, 3, 5, sigma=4.0)]
    groups = [Group(prompted, x, lambda of, x=x: {"prompt": x.flatten(1)[of, 0]}) for x in parts]
    sizes = set()

    def true(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        sizes.add(x.shape[1:])
        return TRUE * x

    taught = run_teacher(Latents([replace(g, model=true) for g in groups]), SIGMAS, Teacher("euler", 1))
    targets = replace(taught, latents=Latents(groups))
    # Only evaluations that begin a run have the prompt's own number: so one step.
    row = plain(torch.tensor([4.0, 0.0], dtype=torch.float64))
    training = LoraTraining(targets, [row], toy, LoraRecipe(10))
    assert len(sizes) == 2
    training.run()
    assert training.stopped_at is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"iterations": 0}, "at least one iteration"),
        ({"batch": 0}, "one latent"),
        ({"rate": 0.0}, "learning rate"),
        ({"loss": "middle"}, "loss"),
    ],
)
def test_invalid_recipes_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(DodeError, match=words):
        LoraRecipe(**{"iterations": 1, **change})  # type: ignore[arg-type]


def test_rows_that_cannot_be_trained_for_are_refused() -> None:
    toy = Toy()
    targets = targets_for(toy, latents(4, sigma=4.0))
    for row, recipe, words in (
        (LambdaRow("heun", SIGMAS.numpy(), (2, 1), [0.0] * 3), LoraRecipe(1), "once a step"),
        (plain(SIGMAS, 0.0, 0.1), LoraRecipe(1, loss=STEP), "plain Euler"),
        (plain(SIGMAS * 0.99), LoraRecipe(1, loss=STEP), "no state at"),
    ):
        with pytest.raises(DodeError, match=words):
            LoraTraining(targets, [row], toy, recipe)
    with pytest.raises(DodeError, match="two latents"):
        LoraTraining(targets_for(toy, latents(1, sigma=4.0)), [plain()], toy, LoraRecipe(1))
    with pytest.raises(DodeError, match="one row"):
        LoraTraining(targets, [], toy, LoraRecipe(1))


def test_a_batch_is_tried_before_and_nothing_is_learned_from_it() -> None:
    toy, telling = Toy(), Telling()
    x = Latents.of(toy, latents(8, sigma=4.0))
    longer = plain(torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    recipe = LoraRecipe(10, batch=3)
    try_batch(x, [plain(), longer], toy, recipe, telling)
    telling.check(3 * 3 * (1 + 3), recipe.trial_cost(x, [2, 3]))
    assert toy.theta.item() == toy.strength == 0
    assert toy.theta.grad is None


def test_what_a_batch_needs_of_memory_is_found_out_before() -> None:
    class Large(Toy):
        def __call__(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
            y = super().__call__(x, sigma)
            if y.requires_grad:
                y.register_hook(self.no_more)
            return y

        @staticmethod
        def no_more(gradient: Tensor) -> None:
            raise RuntimeError("CUDA out of memory")

    toy = Large()
    with pytest.raises(DodeError, match="batch_size smaller than 3"):
        try_batch(Latents.of(toy, latents(8, sigma=4.0)), [plain()], toy, LoraRecipe(10, batch=3))
    assert toy.strength == 0


# --- On a network, with low-rank adapters ----------------------------------------------------------------


class Network(nn.Module):
    """A convolution, a linear layer over the channels, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Conv2d(2, 6, 3, padding=1)
        self.mix = nn.Linear(6, 6)
        self.leave = nn.Conv2d(6, 2, 3, padding=1, stride=1)
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.enter(x).movedim(1, -1))).movedim(-1, 1)
        return self.leave(h)

    def denoise(self, x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        sigma = sigma[:, None, None, None]
        return x - sigma * self(x / (1 + sigma**2).sqrt())


def refined(network: Network) -> tuple[Targets, LambdaRow]:
    """A row of weights over the history, with its first step free, and a band of its own."""
    targets = run_teacher(
        Latents.of(network.denoise, latents(8, 2, 4, 4, sigma=4.0)), SIGMAS, Teacher(scale=4)
    )
    weights = [
        [[1.0, 0, 0, 0], [0.1, -0.2, 1.1, 0], [0, 0.3, -0.4, 1.2]],
        [[0.0] * 4, [0, 0.1, 0, 0], [0, 0, 0.1, -0.1]],
    ]
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64).numpy()
    origin = Origin(REFINED, "euler", {}, SIGMAS.numpy())
    free = FreeOutputs(first=True, start=True)
    return targets, LambdaRow("euler", sigmas, (1, 1, 1), weights, form="history", free=free, origin=origin)


def test_before_it_learns_it_gives_the_row_s_own_result_and_at_strength_0_ever_after() -> None:
    network = Network()
    targets, row = refined(network)
    x = latents(3, 2, 4, 4, sigma=4.0, seed=1)

    def sampled() -> Tensor:
        return sample_dode(network.denoise, x, torch.tensor(row.sigmas), row=row)

    alone = sampled()
    adapters = LowRank(network, 2)
    assert torch.equal(sampled(), alone)
    best = LoraTraining(targets, [row], adapters, LoraRecipe(40)).run()
    assert best.strength > 0
    assert not torch.equal(sampled(), alone)
    adapters.strength = 0
    assert torch.equal(sampled(), alone)


def noting_ends(of: Latents, seen: list[Tensor]) -> Latents:
    """Latents whose runs' ends are noted."""

    def around(sample: Callable[[dict[str, object]], Tensor], indices: Tensor, sigmas: Tensor) -> Tensor:
        seen.append(sample({}))
        return seen[-1]

    return replace(of, groups=[replace(group, around=around) for group in of.groups])


def test_what_is_trained_is_what_is_sampled() -> None:
    """The loop's last state, for a row of Euler's to the bit, for another sampler's to rounding."""
    network = Network()
    targets, row = refined(network)
    by_2m = distill(targets, SIGMAS, solver="dpmpp_2m")
    for each, equal in ((row, torch.equal), (by_2m, torch.allclose)):
        seen: list[Tensor] = []
        noting = replace(targets, latents=noting_ends(targets.latents, seen))
        adapters = LowRank(network, 1)
        LoraTraining(noting, [each], adapters, LoraRecipe(1, batch=6, rate=1e-30)).run()
        fitted = sorted(targets.latents.fitted)
        x = targets.latents.groups[0].x
        expected = sample_dode(network.denoise, x, torch.tensor(each.sigmas), row=each)
        trained = next(end for end in seen if len(end) == len(fitted))
        adapters.strength = 0
        found = trained[torch.cdist(expected[fitted].flatten(1), trained.flatten(1)).argmin(1)]
        assert equal(found, expected[fitted])


def test_checkpointing_changes_memory_and_nothing_else() -> None:
    found, kept = [], []
    for checkpointing in (True, False):
        network = Network()
        targets, row = refined(network)
        adapters = LowRank(network, 2)
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            best = LoraTraining(targets, [row], adapters, LoraRecipe(6, checkpointing=checkpointing)).run()
        found.append(torch.cat([each.flatten() for each in best.numbers]))
        kept.append(sum(sizes))
    assert torch.allclose(*found, rtol=1e-9, atol=1e-12)
    assert kept[0] < 0.7 * kept[1]
