"""Samplers equal the hosts', converge at their order on closed forms, and keep k-diffusion's convention."""

from __future__ import annotations

import math

import pytest
import torch

from dode_nodes.errors import DodeError
from dode_nodes.sampling import solvers
from dode_nodes.sampling.solvers import SOLVERS, resolve, use_host
from tests.oracles import Gaussian, two_peaks

VE, FLOW = Gaussian(flow=False), Gaussian(flow=True)

STAGES = {"heun": 2, "dpm_2": 2}  # evaluations a step; 1 where not named, dpm_solver_3 apart


def karras(steps: int, sigma_min: float = 0.03, sigma_max: float = 14.6) -> torch.Tensor:
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (sigma_max ** (1 / 7) + ramp * (sigma_min ** (1 / 7) - sigma_max ** (1 / 7))) ** 7


def log_grid(start: float, end: float, steps: int) -> torch.Tensor:
    return torch.linspace(math.log(start), math.log(end), steps + 1, dtype=torch.float64).exp()


def uniform_grid(start: float, end: float, steps: int) -> torch.Tensor:
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def to_zero(sigmas: torch.Tensor) -> torch.Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


GRIDS = {
    "karras to 0": lambda steps: to_zero(karras(steps)),
    "karras to sigma_min": lambda steps: karras(steps + 1),
    "flow to 0": lambda steps: uniform_grid(1.0, 0.0, steps),
    "flow to 0.1": lambda steps: uniform_grid(1.0, 0.1, steps),
}


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


class Recorder:
    """A denoiser that remembers what it was asked and what it answered; it is also the callback."""

    def __init__(self, model=two_peaks):
        self.model = model
        self.calls: list[dict] = []
        self.reports: list[dict] = []

    def __call__(self, x, sigma, **extra_args):
        denoised = self.model(x, sigma)
        self.calls.append({"x": x, "sigma": sigma, "denoised": denoised, "extra_args": extra_args})
        return denoised

    def callback(self, report):
        self.reports.append(report | {"evaluation": len(self.calls) - 1})


# --- Equality with the hosts --------------------------------------------------------------------------


class ComfyModel:
    """two_peaks as ComfyUI's samplers get their model: 3M SDE asks behind the call for the noise schedule."""

    def __init__(self, comfyui):
        self.inner_model = self.model_patcher = self
        self.get_model_object = lambda name: comfyui.model_sampling.ModelSamplingDiscrete()

    def __call__(self, x, sigma, **extra_args):
        return two_peaks(x, sigma)


def without_noise(sample_sde):
    return lambda *args, **kwargs: sample_sde(*args, **kwargs, eta=0.0, noise_sampler=lambda *_: 0)


@pytest.mark.comfyui
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "dpmpp_2m", "ipndm"])
def test_equals_comfyui_bit_for_bit(comfyui, name, grid):
    host = getattr(comfyui.k_diffusion.sampling, f"sample_{name}")
    for dtype in (torch.float64, torch.float32):
        for steps in range(1, 11):
            sigmas = GRIDS[grid](steps).to(dtype)
            x = noise(3, 2, 4, 4, dtype=dtype) * sigmas[0]
            ours = SOLVERS[name](two_peaks, x, sigmas, disable=True)
            assert torch.equal(ours, host(two_peaks, x, sigmas, disable=True))


@pytest.mark.comfyui
@pytest.mark.parametrize("grid", GRIDS)
def test_dpmpp_3m_equals_comfyui(comfyui, grid):
    host = without_noise(comfyui.k_diffusion.sampling.sample_dpmpp_3m_sde)
    for steps in range(1, 11):
        sigmas = GRIDS[grid](steps)
        x = noise(3, 2, 4, 4) * sigmas[0]
        ours = SOLVERS["dpmpp_3m"](two_peaks, x, sigmas, disable=True)
        theirs = host(ComfyModel(comfyui), x, sigmas, disable=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.comfyui
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # ComfyUI's np.log of a tensor
@pytest.mark.parametrize("max_order", [2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_deis_equals_comfyui_to_its_quadrature(comfyui, grid, max_order):
    host = comfyui.k_diffusion.sampling.sample_deis
    for steps in range(1, 11):
        sigmas = GRIDS[grid](steps)
        x = noise(3, 2, 4, 4) * sigmas[0]
        ours = SOLVERS["deis"](two_peaks, x, sigmas, disable=True, max_order=max_order)
        theirs = host(two_peaks, x, sigmas, disable=True, max_order=max_order)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.comfyui
@pytest.mark.parametrize("max_order", [2, 3])
def test_ipndm_of_lower_order_equals_comfyui(comfyui, max_order):
    sigmas, x = to_zero(karras(7)), noise(2, 3) * 14.6
    host = comfyui.k_diffusion.sampling.sample_ipndm
    ours = SOLVERS["ipndm"](two_peaks, x, sigmas, disable=True, max_order=max_order)
    assert torch.equal(ours, host(two_peaks, x, sigmas, disable=True, max_order=max_order))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "dpmpp_2m", "dpmpp_3m"])
def test_equals_k_diffusion(k_diffusion, name, grid):
    if name == "dpmpp_3m":
        theirs = without_noise(k_diffusion.sample_dpmpp_3m_sde)
    else:
        theirs = getattr(k_diffusion, f"sample_{name}")
    # k-diffusion's own 3M raises UnboundLocalError where its only step goes into 0; ComfyUI's does not.
    for steps in range(2 if name == "dpmpp_3m" else 1, 11):
        sigmas = GRIDS[grid](steps)
        x = noise(3, 2, 4, 4) * sigmas[0]
        ours = SOLVERS[name](two_peaks, x, sigmas, disable=True)
        torch.testing.assert_close(ours, theirs(two_peaks, x, sigmas, disable=True), rtol=1e-13, atol=1e-13)


# --- DPM-Solver-3 -------------------------------------------------------------------------------------

ORDERS = {
    1: [1],
    2: [2],
    3: [2, 1],
    4: [3, 1],
    5: [3, 2],
    6: [3, 2, 1],
    7: [3, 3, 1],
    8: [3, 3, 2],
    9: [3, 3, 2, 1],
    10: [3, 3, 3, 1],
}
ORDERS_TO_ZERO = ORDERS | {2: [1, 1], 5: [3, 1, 1], 8: [3, 3, 1, 1]}


@pytest.mark.parametrize("evaluations", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_dpm_solver_3_takes_k_diffusions_steps(k_diffusion, grid, evaluations):
    sigmas = GRIDS[grid](evaluations)
    x = noise(3, 2, 4, 4) * sigmas[0]
    recorder = Recorder()
    ours = SOLVERS["dpm_solver_3"](recorder, x, sigmas, callback=recorder.callback, disable=True)

    theirs = k_diffusion.DPMSolver(two_peaks)
    step = {1: theirs.dpm_solver_1_step, 2: theirs.dpm_solver_2_step, 3: theirs.dpm_solver_3_step}
    i, starts = 0, []
    for order in (ORDERS_TO_ZERO if sigmas[-1] == 0 else ORDERS)[evaluations]:
        starts.append(i)
        if sigmas[i + order] == 0:
            x = two_peaks(x, sigmas[i].expand(len(x)))
        else:
            x, _ = step[order](x, -sigmas[i].log(), -sigmas[i + order].log())
        i += order

    torch.testing.assert_close(ours, x, rtol=1e-12, atol=1e-12)
    assert len(recorder.calls) == evaluations
    assert [report["i"] for report in recorder.reports] == starts


# --- Order of convergence -----------------------------------------------------------------------------


CLOSED_FORMS = {
    "VE": (VE, lambda steps: log_grid(10, 0.1, steps)),
    "flow": (FLOW, lambda steps: uniform_grid(1.0, 0.1, steps)),
}


def order_of_convergence(name, model, grid):
    def error(steps):
        sigmas = grid(steps)
        start = noise(8)[:, None] * sigmas[0]
        end = SOLVERS[name](model, start, sigmas, disable=True)
        return float((end - model.solve(start, sigmas[0], sigmas[-1])).abs().max())

    coarse, fine = 257, 1025  # both leave 2 when divided by 3, so that DPM-Solver-3 has no step of order 1
    return math.log(error(coarse) / error(fine)) / math.log(fine / coarse)


@pytest.mark.parametrize("case", CLOSED_FORMS)
@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("euler", 1),
        ("heun", 2),
        ("dpm_2", 2),
        ("dpm_solver_3", 3),
        ("dpmpp_2m", 2),
        ("dpmpp_3m", 2),  # as published; see its docstring
        ("ipndm", 2),  # its Euler start's; the order of its steps is tested below
    ],
)
def test_order_of_convergence(name, order, case):
    assert order_of_convergence(name, *CLOSED_FORMS[case]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("case", CLOSED_FORMS)
def test_deis_converges_at_order_2_at_least(case):
    """Its Euler start's order is 2, its steps' is 3: the sum of both errors lies between, nearly."""
    assert 1.85 < order_of_convergence("deis", *CLOSED_FORMS[case]) < 3.1


@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
def test_ipndm_is_exact_for_polynomials_on_equal_steps(max_order):
    """Adams–Bashforth of order p integrates polynomials of degree p − 1 exactly, once it has started."""
    check_multistep_exact("ipndm", uniform_grid(2.0, 0.5, 9), max_order, lambda sigma: sigma)


@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
def test_deis_is_exact_for_polynomials_in_vp_time(max_order):
    check_multistep_exact("deis", log_grid(40.0, 0.05, 9), max_order, vp_time)


def vp_time(sigma):
    """t of σ² = exp(β_d t²/2 + β_min t) − 1, by bisection; β such that σ(1) = 80 and σ(0.001) = 0.002."""
    beta_min, half_beta_d = torch.linalg.solve(
        torch.tensor([[1e-3, 1e-6], [1.0, 1.0]], dtype=torch.float64),
        torch.tensor([0.002**2, 80.0**2], dtype=torch.float64).log1p(),
    )
    low, high = torch.full_like(sigma, 1e-4), torch.full_like(sigma, 1.5)
    for _ in range(60):
        mid = (low + high) / 2
        above = (half_beta_d * mid**2 + beta_min * mid).expm1() > sigma**2
        low, high = torch.where(above, low, mid), torch.where(above, mid, high)
    return mid


def check_multistep_exact(name, sigmas, max_order, time):
    """dx/dσ = t(σ)^(p − 1) leaves no error in a step that has p derivatives to go by."""

    def derivative(sigma):
        return time(sigma) ** (max_order - 1)

    recorder = Recorder(lambda x, sigma: x - (sigma * derivative(sigma))[:, None])
    end = SOLVERS[name](recorder, noise(1, 1), sigmas, disable=True, max_order=max_order)
    states = [call["x"].item() for call in recorder.calls] + [end.item()]

    for i in range(max_order - 1, len(sigmas) - 1):
        step = sigmas[i + 1] - sigmas[i]
        midpoints = sigmas[i] + (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * step
        exact = derivative(midpoints).mean() * step
        assert states[i + 1] - states[i] == pytest.approx(float(exact), rel=1e-7)


@pytest.mark.parametrize("name", ["ipndm", "deis"])
def test_max_order_1_is_euler(name):
    sigmas, x = to_zero(karras(5)), noise(2, 3) * 14.6
    ours = SOLVERS[name](two_peaks, x, sigmas, disable=True, max_order=1)
    torch.testing.assert_close(ours, solvers.sample_euler(two_peaks, x, sigmas, disable=True))


@pytest.mark.parametrize("name", ["ipndm", "deis"])
@pytest.mark.parametrize("max_order", [0, 5])
def test_max_order_out_of_range_is_refused(name, max_order):
    with pytest.raises(DodeError, match=f"max_order must be 1, 2, 3 or 4, not {max_order}"):
        SOLVERS[name](two_peaks, noise(2, 3), karras(5), disable=True, max_order=max_order)


# --- The calling convention ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_callback_gets_the_current_state_once_a_step(name):
    sigmas, x = to_zero(karras(7)), noise(2, 3) * 14.6
    recorder = Recorder()
    SOLVERS[name](recorder, x, sigmas, callback=recorder.callback, disable=True)

    stages = STAGES.get(name, 1)
    if name == "dpm_solver_3":
        starts, evaluations = [0, 3, 6], [0, 3, 6]
    else:  # two-stage methods take one into 0
        starts, evaluations = list(range(7)), [stages * i for i in range(7)]
    assert [report["i"] for report in recorder.reports] == starts
    assert [report["evaluation"] for report in recorder.reports] == evaluations
    for report in recorder.reports:
        call = recorder.calls[report["evaluation"]]
        assert report["x"] is call["x"]
        assert report["denoised"] is call["denoised"]
        assert report["sigma"] == report["sigma_hat"] == sigmas[report["i"]] == call["sigma"][0]
    assert recorder.reports[0]["x"] is x


@pytest.mark.parametrize("name", SOLVERS)
def test_model_gets_one_sigma_per_sample_and_the_extra_args(name):
    recorder = Recorder()
    SOLVERS[name](recorder, noise(3, 2), karras(6), extra_args={"seed": 5}, disable=True)
    for call in recorder.calls:
        assert call["sigma"].shape == (3,)
        assert call["extra_args"] == {"seed": 5}


@pytest.mark.parametrize("name", SOLVERS)
def test_last_step_into_zero_returns_denoised(name):
    recorder = Recorder()
    end = SOLVERS[name](recorder, noise(2, 3) * 14.6, to_zero(karras(7)), disable=True)
    torch.testing.assert_close(end, recorder.calls[-1]["denoised"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("sigmas", [torch.tensor([]), torch.tensor([3.0])], ids=["no σ", "one σ"])
def test_no_step_returns_x(name, sigmas):
    x, recorder = noise(2, 3), Recorder()
    assert torch.equal(SOLVERS[name](recorder, x, sigmas, callback=recorder.callback, disable=True), x)
    assert recorder.calls == recorder.reports == []


@pytest.mark.parametrize("name", SOLVERS)
def test_rank_does_not_matter(name):
    sigmas, x = to_zero(karras(6)), noise(2, 3, 2, 4, 5) * 14.6
    video = SOLVERS[name](two_peaks, x, sigmas, disable=True)
    flat = SOLVERS[name](two_peaks, x.flatten(1), sigmas, disable=True)
    torch.testing.assert_close(video.flatten(1), flat, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", SOLVERS)
def test_half_precision_stays_half_precision(name):
    sigmas, x = to_zero(karras(6)), noise(2, 3, 4) * 14.6
    recorder = Recorder()
    half = SOLVERS[name](recorder, x.half(), sigmas.float(), disable=True)
    assert {call[key].dtype for call in recorder.calls for key in ("x", "sigma")} == {torch.float16}
    assert half.dtype == torch.float16
    exact = SOLVERS[name](two_peaks, x, sigmas, disable=True)
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=0.06)  # x starts at 30, known to 0.016


@pytest.mark.parametrize("name", SOLVERS)
def test_inputs_are_left_alone(name):
    sigmas, x = to_zero(karras(6)), noise(2, 3) * 14.6
    sigmas_before, x_before = sigmas.clone(), x.clone()
    SOLVERS[name](two_peaks, x, sigmas, disable=True)
    assert torch.equal(sigmas, sigmas_before)
    assert torch.equal(x, x_before)


@pytest.mark.parametrize("name", SOLVERS)
def test_no_graph_is_kept(name):
    x = noise(2, 3).requires_grad_()
    assert not SOLVERS[name](two_peaks, x, karras(4), disable=True).requires_grad


@pytest.mark.parametrize("name", SOLVERS)
def test_progress_bar_is_shown_unless_disabled(name, capsys):
    SOLVERS[name](two_peaks, noise(2, 3), karras(4), disable=True)
    assert capsys.readouterr().err == ""
    SOLVERS[name](two_peaks, noise(2, 3), karras(4), disable=False)
    assert "100%" in capsys.readouterr().err


# --- Names --------------------------------------------------------------------------------------------


@pytest.fixture
def host():
    """A host's samplers, by name, while a test lasts."""
    samplers = {}
    use_host(samplers.get)
    yield samplers
    use_host(None)


def test_name_resolves_to_ours():
    assert resolve("dpmpp_2m") is solvers.sample_dpmpp_2m


def test_callable_resolves_to_itself():
    def sample_mine(model, x, sigmas, **kwargs):
        return x

    assert resolve(sample_mine) is sample_mine


def test_host_comes_first_and_is_asked_each_time(host):
    def hosts_euler(*args, **kwargs): ...
    def reloaded_euler(*args, **kwargs): ...

    assert resolve("euler") is solvers.sample_euler
    host["euler"] = hosts_euler
    assert resolve("euler") is hosts_euler
    host["euler"] = reloaded_euler
    assert resolve("euler") is reloaded_euler
    assert resolve("heun") is solvers.sample_heun


def test_removed_host_is_not_asked(host):
    host["euler"] = len
    use_host(None)
    assert resolve("euler") is solvers.sample_euler


@pytest.mark.usefixtures("host")
def test_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(DodeError, match=r"'dpmpp_2n' \(did you mean dpmpp_2m\?\); there are euler, .*, deis"):
        resolve("dpmpp_2n")
    with pytest.raises(DodeError, match="'xyz'; there are"):
        resolve("xyz")


def test_unknown_name_is_told_from_the_hosts_names_and_ours():
    use_host({"res_2m": solvers.sample_euler}.get, lambda: ["res_2m", "euler"])
    try:
        with pytest.raises(
            DodeError, match=r"'res_2n' \(did you mean res_2m\?\); there are res_2m, euler, heun, "
        ):
            resolve("res_2n")
    finally:
        use_host(None)
    with pytest.raises(DodeError, match="'res_2n'; there are euler"):
        resolve("res_2n")


@pytest.mark.parametrize("name", ["a & b", "<two words>", "", "x" * 101])
def test_name_that_no_row_can_keep_is_refused_though_the_host_has_it(host, name):
    host[name] = solvers.sample_euler
    with pytest.raises(DodeError, match="a table cannot store this solver's name"):
        resolve(name)


def test_solvers_is_read_only():
    with pytest.raises(TypeError):
        SOLVERS["euler"] = solvers.sample_heun
