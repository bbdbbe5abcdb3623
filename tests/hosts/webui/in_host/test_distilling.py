"""The tab's and the API's work, in the real host on a small network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

PROMPTS = ["a cat", "a dog in the street"]


def request_of(**changes: Any) -> Any:
    """A few seconds' work."""
    from dode_nodes.hosts.webui.request import Request

    common = {
        "prompts": PROMPTS, "negative_prompt": "bad", "cfg_scale": 3.0, "width": 64, "height": 64, "steps": "2",
        "quality": "quick", "name": "made", "for_comfyui": True,
    }  # fmt: skip
    return Request(**common | changes)


def by_hand(host: Any, network: Any, cfg: float, *, flow: bool) -> tuple[list[Any], Any]:
    """The denoisers of both prompts, without the host's, and its noise."""
    from modules import prompt_parser

    from dode_nodes import Group
    from dode_nodes.hosts.webui.model_facts import noise_schedule

    schedule = noise_schedule(host)

    def context_of(text: str, negative: bool) -> torch.Tensor:
        texts = prompt_parser.SdConditioning([text], is_negative_prompt=negative, width=64, height=64)
        return host.get_learned_conditioning(texts)

    negative = context_of("bad", True)

    def denoiser_of(prompt: str) -> Any:
        contexts = context_of(prompt, False), negative

        def denoised(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            s = sigma.reshape(-1, 1, 1, 1)
            scaled = x if flow else x / (s**2 + 1).sqrt()
            t = schedule.timestep(sigma.float()).float()
            positive, uncond = (x - s * network(scaled, t, context=each) for each in contexts)
            return uncond + cfg * (positive - uncond)

        return denoised

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 4, 8, 8, generator=generator) * schedule.sigma_max
    parts = noise.tensor_split(2)
    return [Group(denoiser_of(prompt), part) for prompt, part in zip(PROMPTS, parts, strict=True)], schedule


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_the_rows_are_those_of_the_same_model_without_the_host(kind, host, small_network, as_flow, make):
    from dode_nodes import Latents, Teacher, distill, run_teacher
    from dode_nodes.hosts.webui.job import Job
    from dode_nodes.sampling.schedules import make_sigmas

    if kind == "flow":
        as_flow()
    job = Job(request_of())
    job.run()
    assert job.failed == ""
    assert "evaluations: teacher" in job.lines[0]
    assert job.table.model["prediction_type"] == kind
    assert job.table.rows[0].settings["cfg"] == 3
    assert job.report is not None
    groups, schedule = by_hand(host, small_network, 3.0, flow=kind == "flow")
    sigmas = make_sigmas("simple" if kind == "flow" else "karras", 2, schedule)
    with torch.inference_mode():
        targets = run_teacher(Latents(groups, 4), sigmas, Teacher(flow=kind == "flow"))
        rows = [distill(targets, sigmas, solver="euler", prediction=name) for name in ("noise", "data")]
    mine = min(rows, key=lambda row: row.error_from())
    assert job.table.rows[0].prediction == mine.prediction
    assert job.table.rows[0].weights == pytest.approx(mine.weights, abs=2e-3, rel=2e-3)
    chosen = make("auto", cfg_scale=3.0)
    assert f"λ table {job.path.stem}" in chosen.said
    assert "made for this checkpoint" in chosen.said


def test_an_interruption_keeps_what_there_is_and_leaves_nothing_in_the_host():
    from modules import sd_samplers, shared

    from dode_nodes.hosts.webui.job import Job

    class Interrupted(Job):
        def __call__(self, progress: Any) -> None:
            super().__call__(progress)
            assert shared.state.sampling_steps == progress.total
            assert "evaluations" in shared.state.textinfo
            assert "D-ODE distilling" not in [each.name for each in sd_samplers.all_samplers]
            if progress.stage == "stock settings":
                self.cancel()

    before = dict(sd_samplers.all_samplers_map), list(sd_samplers.all_samplers)
    job = Interrupted(request_of(prompts=["a cat"]))
    job.run()
    shared.state.interrupted = False  # as the host has it when its next job begins
    assert job.failed == "it was interrupted"
    assert job.table is not None
    assert job.path.exists()
    assert shared.state.job == ""
    assert (dict(sd_samplers.all_samplers_map), list(sd_samplers.all_samplers)) == before


def test_what_is_cancelled_in_the_queue_does_not_begin():
    from dode_nodes.hosts.webui.job import Job

    job = Job(request_of())
    job.cancel()
    job.run()
    assert (job.table, job.lines) == (None, ["it was interrupted"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": "many"}, "steps must be numbers"),
        ({"quality": "perfect"}, "quality must be one of"),
        ({"prompts": []}, "write a prompt"),
        ({"name": "../out"}, "give the table another name"),
        ({"name": ""}, "give the table a name"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(changes, match):
    from dode_nodes.errors import DodeError
    from dode_nodes.hosts.webui.job import Job

    with pytest.raises(DodeError, match=match):
        Job(request_of(**changes))


def test_a_host_that_leaves_the_negative_prompt_out_at_times_is_refused(monkeypatch):
    from modules import shared

    from dode_nodes.hosts.webui.job import Job

    monkeypatch.setitem(shared.opts.data, "skip_early_cond", 0.2)
    job = Job(request_of())
    job.run()
    assert "Ignore negative prompt during early sampling" in job.failed


def test_the_tab_is_made():
    from dode_nodes.hosts.webui import tab

    ((blocks, label, name),) = tab.make()
    assert (label, name) == ("Distil λ", "dode_distil")
    assert blocks.blocks
