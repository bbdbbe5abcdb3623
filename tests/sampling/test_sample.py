"""Sampling with λ: solvers that are one another for some λ, parts of schedules, and a sampler's manners."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from dode_nodes.errors import DodeError, IneligibleSampler, NotFinite
from dode_nodes.sampling import sample as sample_module
from dode_nodes.sampling.probe import probe_student, solver_name
from dode_nodes.sampling.sample import check_finite, sample_dode
from dode_nodes.sampling.solvers import SOLVERS, sample_euler, sample_heun, sample_ipndm, use_host
from dode_nodes.tables.row import LambdaRow
from tests.oracles import two_peaks
from tests.toys import Counting, Interrupted, karras, latents, uniform, writes_into_what_it_is_given


def row_of(solver="euler", weights=None, *, sigmas=None, **facts):
    """A row of this solver; λ = 0.1, 0.2, … if no weights are given."""
    sigmas = karras(6) if sigmas is None else sigmas
    counts = evaluations(solver, tuple(sigmas.tolist()))
    weights = 0.1 * np.arange(sum(counts)) if weights is None else weights
    return LambdaRow(solver, sigmas.double().numpy(), counts, weights, **facts)


@cache
def evaluations(solver, sigmas):
    return probe_student(SOLVERS[solver], torch.tensor(sigmas, dtype=torch.float64)).per_step


def as_history(lambdas):
    """Eq. 8's triangle with the same outputs as these λ."""
    n = len(lambdas)
    weights = np.eye(n)
    for k in range(1, n):
        weights[k, k] += lambdas[k]
        weights[k, k - 1] -= lambdas[k]
    return weights


def sample(row, x, sigmas=None, **kwargs):
    sigmas = torch.from_numpy(np.array(row.sigmas)).to(x.dtype) if sigmas is None else sigmas
    return sample_dode(kwargs.pop("model", two_peaks), x, sigmas, disable=True, row=row, **kwargs)


def assert_equal_to_rounding(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --- Oracles: solvers that are one another for some λ --------------------------------------------------


def second_order(ratio):
    """λ_k as a function of h_k / h_{k−1}; 0 at the first evaluation and for the step into σ = 0."""

    def lambdas(steps):
        found = [0.0] * len(steps)
        for k in range(1, len(steps) - 1):
            found[k] = ratio(steps[k] / steps[k - 1])
        return np.array(found)

    return lambdas


def in_log_sigma(sigmas):
    return [float("inf") if low == 0 else float((high / low).log()) for high, low in pairwise(sigmas)]


def in_sigma(sigmas):
    return [float(high - low) for high, low in pairwise(sigmas)]


@pytest.mark.parametrize("schedule", [karras, uniform])
@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_dpmpp_2m_is_euler_with_lambda_of_half_the_step_ratio(schedule, steps):
    sigmas = schedule(steps)
    lambdas = second_order(lambda ratio: ratio / 2)(in_log_sigma(sigmas))
    x = latents(3, sigma=float(sigmas[0]))
    got = sample(row_of("euler", lambdas, sigmas=sigmas, prediction="data"), x)
    assert_equal_to_rounding(got, SOLVERS["dpmpp_2m"](two_peaks, x, sigmas, disable=True))


@pytest.mark.parametrize("schedule", [karras, uniform])
@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_ipndm_of_order_2_is_euler_with_lambda_one_half(schedule, steps):
    sigmas = schedule(steps)
    lambdas = second_order(lambda ratio: 0.5)(in_sigma(sigmas))
    x = latents(3, sigma=float(sigmas[0]))
    got = sample(row_of("euler", lambdas, sigmas=sigmas, prediction="noise"), x)
    assert_equal_to_rounding(got, sample_ipndm(two_peaks, x, sigmas, disable=True, max_order=2))


@pytest.mark.comfyui
@pytest.mark.parametrize("schedule", [karras, uniform])
def test_gradient_estimation_is_euler_with_lambda_one(comfyui, schedule):
    sigmas = schedule(6)
    lambdas = second_order(lambda ratio: 1.0)(in_sigma(sigmas))
    x = latents(3, sigma=float(sigmas[0]))
    got = sample(row_of("euler", lambdas, sigmas=sigmas, prediction="noise"), x)
    theirs = comfyui.k_diffusion.sampling.sample_gradient_estimation
    assert_equal_to_rounding(got, theirs(two_peaks, x, sigmas, disable=True))


@pytest.mark.parametrize("schedule", [karras, uniform])
def test_lms_of_order_2_is_euler_with_adams_bashforths_lambda(k_diffusion, schedule):
    """Of unequal steps. k-diffusion's extrapolates into σ = 0, so it stops before."""
    sigmas = schedule(6)
    lambdas = second_order(lambda ratio: ratio / 2)(in_sigma(sigmas))
    x = latents(3, sigma=float(sigmas[0]))
    got = sample(row_of("euler", lambdas, sigmas=sigmas, prediction="noise"), x, sigmas[:-1])
    theirs = k_diffusion.sample_lms(two_peaks, x, sigmas[:-1], disable=True, order=2)
    torch.testing.assert_close(got, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", [karras, uniform])
def test_ipndm_of_order_3_is_equation_8_with_adams_bashforths_weights(schedule):
    sigmas = schedule(6)
    weights = np.zeros((6, 6))
    weights[0, 0] = weights[5, 5] = 1
    weights[1, :2] = [-1 / 2, 3 / 2]
    for k in range(2, 5):
        weights[k, k - 2 : k + 1] = [5 / 12, -16 / 12, 23 / 12]
    x = latents(3, sigma=float(sigmas[0]))
    got = sample(row_of("euler", weights, sigmas=sigmas, form="history"), x)
    assert_equal_to_rounding(got, sample_ipndm(two_peaks, x, sigmas, disable=True, max_order=3))


@pytest.mark.parametrize("first", [0, 1, 3, 5])
@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
def test_lambda_and_its_triangle_sample_the_same(solver, prediction, first):
    row = row_of(solver, prediction=prediction)
    triangle = row_of(solver, as_history(row.weights), prediction=prediction, form="history")
    sigmas = karras(6)[first:]
    x = latents(3, sigma=float(sigmas[0]))
    assert_equal_to_rounding(sample(row, x, sigmas), sample(triangle, x, sigmas))


def test_missing_weight_moves_to_the_oldest_output():
    """A suffix of Eq. 8 by hand: three outputs weigh in the last evaluation, two are there."""
    weights = np.array([[1.0, 0, 0], [0.3, 0.7, 0], [0.2, -0.5, 1.4]])
    row = row_of("euler", weights, sigmas=karras(3), form="history", prediction="data")
    sigmas, x = karras(3)[1:], latents(2)
    first = two_peaks(x, sigmas[:1].expand(2))  # 0.3 of the missing one and 0.7 of its own
    x1 = first + (x - first) * sigmas[1] / sigmas[0]
    last = two_peaks(x1, sigmas[1:2].expand(2))
    assert_equal_to_rounding(sample(row, x, sigmas), (0.2 - 0.5) * first + 1.4 * last)


def test_heun_has_two_lambdas_at_one_sigma():
    """D-EDM by hand: the end of a step and the start of the next ask the same σ, each with its own λ."""
    sigmas, x = karras(3), latents(2)
    lam = [0.0, 0.1, 0.2, 0.3, 0.4]
    row = row_of("heun", np.array(lam), sigmas=sigmas, prediction="noise")
    raw = []

    def d(x, sigma):
        raw.append((x - two_peaks(x, sigma.expand(2))) / sigma)
        k = len(raw) - 1
        return raw[k] + lam[k] * (raw[k] - raw[k - 1]) if k else raw[k]

    expected = x
    for sigma, sigma_next in pairwise(sigmas):
        slope = d(expected, sigma)
        if sigma_next > 0:
            slope = (slope + d(expected + slope * (sigma_next - sigma), sigma_next)) / 2
        expected = expected + slope * (sigma_next - sigma)
    assert_equal_to_rounding(sample(row, x), expected)
    assert row.evaluations == (2, 2, 1)


# --- λ = 0 is the stock sampler -----------------------------------------------------------------------


class Calls:
    def __init__(self):
        self.reports = []

    def __call__(self, report):
        self.reports.append(
            {key: value.clone() if torch.is_tensor(value) else value for key, value in report.items()}
        )


WHOLE, PARTS = slice(None), [slice(3, None), slice(5, None), slice(0, 4)]


@pytest.mark.parametrize(
    ("solver", "part"),
    # DPM-Solver-3 takes another number of intervals as other steps.
    [(name, part) for name in SOLVERS for part in [WHOLE, *(PARTS if name != "dpm_solver_3" else [])]],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_zero_is_the_stock_sampler_bit_for_bit(solver, prediction, dtype, part):
    weights = np.zeros(sum(evaluations(solver, tuple(karras(6).tolist()))))
    zero = row_of(solver, weights, prediction=prediction)
    sigmas = karras(6).float()[part]
    x = latents(3, sigma=float(sigmas[0])).to(dtype)
    ours, theirs = Calls(), Calls()
    got = sample(zero, x, sigmas, callback=ours)
    stock = SOLVERS[solver](two_peaks, x, sigmas, callback=theirs, disable=True)
    assert got.dtype == stock.dtype == dtype
    assert torch.equal(got, stock)
    assert len(ours.reports) == len(theirs.reports) > 0
    for mine, other in zip(ours.reports, theirs.reports, strict=True):
        assert mine.keys() == other.keys() == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(other[key])) for key in mine)


@pytest.mark.parametrize("solver", [None, *SOLVERS])
def test_without_a_row_the_plain_solver_runs(solver):
    x = latents(2)
    got = sample_dode(two_peaks, x, karras(5), disable=True, solver=solver)
    assert torch.equal(got, SOLVERS[solver or "euler"](two_peaks, x, karras(5), disable=True))


@pytest.mark.parametrize(
    "sigmas", [torch.tensor([]), torch.tensor([3.0]), np.array([3.0])], ids=["none", "one", "array"]
)
def test_without_a_step_x_comes_back(sigmas):
    x, model = latents(2), Counting()
    assert sample_dode(model, x, sigmas, row=row_of()) is x
    assert not model.sigmas


# --- Parts of a schedule ------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm_2", "ipndm"])
def test_parts_are_found_by_sigma_in_float32(solver):
    """A prefix, an infix and a suffix in the precision of hosts, whose σ differ in the last bits."""
    row = row_of(solver)
    sigmas = karras(6) * (1 + 3e-6 * torch.randn(7, generator=torch.Generator().manual_seed(0)))
    sigmas, x = sigmas.float(), latents(2).float()
    exact = karras(6).float()
    # The first part of a split run is the beginning of the whole one.
    first = sample(row, x, sigmas[:4])
    assert torch.allclose(first, sample(row, x, exact[:4]), rtol=1e-4, atol=1e-4)
    # Its other parts begin without a predecessor, as a run over a row cut off there would.
    for part in (slice(2, 5), slice(3, None)):
        counts = row.evaluations
        cut = LambdaRow(
            solver, row.sigmas[part.start :], counts[part.start :], row.weights[sum(counts[: part.start]) :]
        )
        x = latents(2, sigma=float(sigmas[part][0])).float()
        torch.testing.assert_close(
            sample(row, x, sigmas[part]), sample(cut, x, exact[part]), rtol=1e-4, atol=1e-4
        )


def test_split_sampling_differs_from_whole_only_by_the_missing_predecessor():
    row, x = row_of("euler", np.array([0, 0.3, 0.2, 0, 0.4, 0.1])), latents(2)
    middle = sample(row, x, karras(6)[:4])  # λ of the evaluation at σ_3 is 0: nothing is missing there
    assert_equal_to_rounding(sample(row, middle, karras(6)[3:]), sample(row, x))


@pytest.mark.parametrize(
    ("sigmas", "why"),
    [
        (karras(6)[1:] * 1.01, r"does not fit these sigmas: no step of euler, 6 steps .* starts at σ = "),
        (torch.cat([karras(6)[:2], karras(6)[3:]]), r"σ = .* at position 2 is not in euler, 6 steps"),
        (karras(7), r"does not fit these sigmas: .* at position 1 is not in"),
        (torch.tensor([14.6, 3.0, 5.0, 0.0]), "ascends"),
        (torch.tensor([14.6, 14.6, 0.0]), "is repeated"),
    ],
)
def test_schedule_that_the_row_does_not_serve_is_refused(sigmas, why):
    model = Counting()
    with pytest.raises(DodeError, match=why):
        sample(row_of(), latents(2), sigmas, model=model)
    assert not model.sigmas


def test_merged_steps_cannot_be_entered_in_the_middle():
    row = row_of("dpm_solver_3", sigmas=karras(7))
    assert row.evaluations == (3, 0, 0, 3, 0, 0, 1)
    assert_equal_to_rounding(sample(row, latents(2), karras(7)[3:]), sample(row, latents(2), karras(7)[3:]))
    for i in (1, 2, 4, 5):
        with pytest.raises(DodeError, match=f"dpm_solver_3 cannot start at step {i} of"):
            sample(row, latents(2), karras(7)[i:])


def looks_ahead(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As ComfyUI's heunpp2: more evaluations for a step where two more σ follow."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma.expand(len(x)))
        if i + 3 < len(sigmas):
            denoised = (denoised + model(x, sigma.expand(len(x)))) / 2
        x = denoised + (x - denoised) * sigma_next / sigma
    return x


@pytest.mark.parametrize(
    ("solver", "stop"), [(looks_ahead, 4), (SOLVERS["dpm_solver_3"], 4), (SOLVERS["dpm_solver_3"], 3)]
)
def test_solver_that_would_take_other_steps_cannot_be_stopped_there(solver, stop):
    sigmas = karras(7)
    queries = probe_student(solver, sigmas)
    row = LambdaRow(solver_name(solver), sigmas.numpy(), queries.per_step, np.zeros(len(queries.sigmas)))
    model = Counting()
    with pytest.raises(DodeError, match=r"cannot stop at σ = .* it would take different steps"):
        sample(row, latents(2), sigmas[:stop], model=model, solver=solver)
    assert not model.sigmas


def test_row_of_another_number_of_evaluations_is_noticed():
    """A table that was tampered with: Heun with one evaluation a step."""
    row = LambdaRow("heun", karras(3).numpy(), (1, 1, 1), np.zeros(3))
    with pytest.raises(
        DodeError, match="'heun' asks the network 5 times over this schedule, but heun, 3 steps"
    ):
        sample(row, latents(2))


def test_a_row_is_probed_once_for_its_numbers_and_its_sampler(monkeypatch):
    """Before the network is asked: a file may name a sampler that no row can be of."""
    probed = []

    def counted(run, sigmas, **given):
        probed.append((run, given["options"]))
        return probe_student(run, sigmas, **given)

    monkeypatch.setattr(sample_module, "probe_student", counted)
    monkeypatch.setattr(sample_module, "_passed", set())
    row, same = (row_of("ipndm", np.arange(6) / 7, settings={"n": n}) for n in range(2))
    other = row_of("ipndm", np.arange(6) / 7, solver_options={"max_order": 2})
    for each in (row, row, same, other, other):
        sample(each, latents(2))
    assert probed == [(sample_ipndm, {}), (sample_ipndm, {"max_order": 2})]

    model = Counting(two_peaks)
    for options in ({"max_order": 0}, {"max_order": -3}, {"max_order": 0.5}):
        with pytest.raises(IneligibleSampler, match="ipndm"):
            sample_dode(
                model, latents(2), karras(6), row=row_of("ipndm", np.zeros(6), solver_options=options)
            )
    assert not model.sigmas


def test_a_stochastic_sampler_is_refused_whatever_a_file_says():
    def stochastic(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma in sigmas[:-1]:
            x = x + torch.randn_like(x) + model(x, sigma * x.new_ones(len(x)))
        return x

    use_host({"euler": stochastic}.get)
    try:
        with pytest.raises(IneligibleSampler, match="is stochastic"):
            sample(row_of(), latents(2))
    finally:
        use_host(None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_names_the_row(bad):
    row = row_of()
    with pytest.raises(
        NotFinite, match=r"from euler, 6 steps \(6 evaluations, noise\). If the stock sampler"
    ):
        sample_dode(lambda x, sigma: x * bad, latents(2), row.sigmas, row=row, disable=True)
    with pytest.raises(NotFinite, match=r"from the λ table 'mine 0123' with euler, 6 steps"):
        check_finite(latents(1) * bad, row, "mine 0123")


# --- A sampler's manners ------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, as_history(0.1 * np.arange(6))], ids=["lambda", "history"])
def test_latents_do_not_depend_on_their_batch(weights):
    row = row_of("euler", weights, form="lambda" if weights is None else "history")
    x = latents(4)
    whole = sample(row, x)
    for i in range(4):
        assert_equal_to_rounding(sample(row, x[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 2, 3, 3)])
def test_any_rank(shape):
    x = latents(3, *shape)
    row = row_of("dpmpp_2m", prediction="data")
    assert_equal_to_rounding(sample(row, x).flatten(1), sample(row, x.flatten(1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "ipndm"])
def test_half_precision(solver, prediction, dtype):
    row, x = row_of(solver, prediction=prediction), latents(3)
    got = sample(row, x.to(dtype), karras(6).float())
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), sample(row, x), rtol=0, atol=60 * eps)


def test_numpy_schedule_of_the_row():
    row = row_of()
    for dtype in (torch.float16, torch.float32, torch.float64):
        x = latents(2).to(dtype)
        got = sample_dode(two_peaks, x, row.sigmas, disable=True, row=row)
        wide = torch.promote_types(dtype, torch.float32)
        assert torch.equal(got, sample(row, x, karras(6).to(wide)))


def test_sampler_that_writes_into_its_sigmas_does_not_write_into_the_row():
    row = LambdaRow("<writes_into_what_it_is_given>", karras(3).numpy(), (1, 1, 1), np.zeros(3))
    solver, extra_args = writes_into_what_it_is_given, {"seed": 1, "model_options": {}}
    sample_dode(two_peaks, latents(2), row.sigmas, extra_args, row=row, solver=solver)
    np.testing.assert_array_equal(row.sigmas, karras(3).numpy())


def test_extra_args_reach_the_model_and_attributes_the_sampler():
    model = Counting()

    def asks_behind_the_call(denoiser, x, sigmas, **kwargs):
        assert denoiser.inner_model is model.inner_model
        return sample_euler(denoiser, x, sigmas, **kwargs)

    row = LambdaRow("<asks_behind_the_call>", karras(3).numpy(), (1, 1, 1), np.array([0, 0.2, 0.2]))
    sample(row, latents(2), karras(3), model=model, solver=asks_behind_the_call, extra_args={"seed": 4})
    assert model.extra_args == [{"seed": 4}] * 3


def test_callback_is_called_once_a_step():
    reports = Calls()
    sample(row_of("heun"), latents(2), callback=reports)
    assert [report["i"] for report in reports.reports] == list(range(6))
    assert [float(report["sigma"]) for report in reports.reports] == karras(6)[:-1].tolist()
    # What it shows is what the sampler works with: the corrected denoised.
    row, seen = row_of("euler", prediction="data"), Calls()
    end = sample(row, latents(2), callback=seen)
    assert torch.allclose(seen.reports[-1]["denoised"], end)


@pytest.mark.parametrize("where", ["callback", "model"])
def test_interruption_passes_unchanged_and_leaves_nothing(where):
    row, x = row_of(), latents(2)
    expected = sample(row, x)
    stop = Interrupted()

    def interrupt(report):
        if report["i"] == 3:
            raise stop

    class Stopping(Counting):
        def __call__(self, x, sigma, **extra_args):
            if len(self.sigmas) == 3:
                raise stop
            return super().__call__(x, sigma, **extra_args)

    with pytest.raises(Interrupted) as caught:
        sample(
            row,
            x,
            callback=interrupt if where == "callback" else None,
            model=Stopping() if where == "model" else two_peaks,
        )
    assert caught.value is stop
    assert torch.equal(sample(row, x), expected)


def test_inputs_are_left_alone():
    row, x, sigmas = row_of(), latents(2), karras(6)
    x_before = x.clone()
    sample(row, x, sigmas)
    assert torch.equal(x, x_before)
    assert torch.equal(sigmas, karras(6))


# --- Which solver -------------------------------------------------------------------------------------


def test_row_of_another_solver_is_refused():
    with pytest.raises(DodeError, match="this row is for the solver 'euler', not 'heun'"):
        sample(row_of(), latents(2), solver="heun")
    with pytest.raises(DodeError, match="this row is for the solver 'euler', not '<heun>'"):
        sample(row_of(), latents(2), solver=sample_heun)


def test_row_of_a_callable_needs_it_again():
    row = LambdaRow("<heun>", karras(3).numpy(), (2, 2, 1), 0.1 * np.arange(5))
    with pytest.raises(
        DodeError, match="give your own sampler function as solver=: this row was distilled with <heun>"
    ):
        sample(row, latents(2))
    named = LambdaRow("heun", karras(3).numpy(), (2, 2, 1), 0.1 * np.arange(5))
    assert torch.equal(sample(row, latents(2), solver=sample_heun), sample(named, latents(2)))


def test_unknown_solver_is_refused():
    row = LambdaRow("of another pack", karras(3).numpy(), (1, 1, 1), np.zeros(3))
    with pytest.raises(DodeError, match="no solver is called 'of another pack'"):
        sample(row, latents(2))


def test_hosts_solver_of_the_name_is_used():
    def hosts(model, x, sigmas, **kwargs):
        for sigma in sigmas[:-1]:
            x = x + 0 * model(x, sigma * x.new_ones(len(x)))
        return x + 1

    use_host({"euler": hosts}.get)
    try:
        assert torch.equal(sample(row_of(), latents(2)), latents(2) + 1)
    finally:
        use_host(None)


def test_solver_options_are_the_rows():
    row, x = row_of("ipndm", np.zeros(6), solver_options={"max_order": 2}), latents(2)
    assert torch.equal(sample(row, x), sample_ipndm(two_peaks, x, karras(6), disable=True, max_order=2))
