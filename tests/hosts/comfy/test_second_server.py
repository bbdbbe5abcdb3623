"""A second server, whose output cannot hold λ or σ, as on Windows where it is redirected; and both at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from dode_nodes import LambdaRow, LambdaTable
from dode_nodes.hosts.comfy.launch import find_comfyui
from dode_nodes.tables.code import to_code
from tests.hosts.comfy.test_server import succeeded
from tests.server import ComfyServer

pytestmark = [pytest.mark.comfyui, pytest.mark.slow_host]

SECONDS = 30


@pytest.fixture(scope="module")
def second(comfyui: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """It writes cp1252."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONUTF8", "0")
        patch.setenv("PYTHONIOENCODING", "cp1252")
        with ComfyServer(find_comfyui(), tmp_path_factory.mktemp("cp1252")) as running:
            yield running


def graph(seed: int, *nodes: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """The embedded model, the table that came with the pack, and ``nodes``, the last of which gives a latent."""
    given = [
        ("DODE_DemoModel", {"kind": "eps", "digit": 3}),
        ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        ("DODE_LoadLambdas", {"name": "demo_eps.safetensors"}),
        *nodes,
        ("SaveLatent", {"samples": [str(len(nodes) + 3), 0], "filename_prefix": f"of seed {seed}"}),
    ]
    return {str(i): {"class_type": name, "inputs": inputs} for i, (name, inputs) in enumerate(given, 1)}


def sampling(seed: int, **changes: Any) -> dict[str, Any]:
    """What KSampler and KSampler (D-ODE) both take."""
    conditionings = {"positive": ["1", 1], "negative": ["1", 2]}
    settings = {
        "model": ["1", 0],
        "latent_image": ["2", 0],
        "seed": seed,
        "steps": 5,
        "cfg": 2.0,
        "denoise": 1.0,
    }
    return conditionings | settings | changes


def with_table(seed: int, **changes: Any) -> dict[str, Any]:
    inputs = sampling(seed, table=["3", 0], solver="any", **changes)
    return graph(seed, ("DODE_KSampler", inputs))


def with_stock(seed: int, **changes: Any) -> dict[str, Any]:
    return graph(seed, ("KSampler", sampling(seed, sampler_name="euler", scheduler="karras", **changes)))


def applied(seed: int, steps: int) -> dict[str, Any]:
    """A KSampler after Apply λ, of a number of steps."""
    apply = ("DODE_ApplyLambdas", {"model": ["1", 0], "table": ["3", 0], "solver": "any"})
    inputs = sampling(seed, model=["4", 0], steps=steps, sampler_name="euler", scheduler="karras")
    return graph(seed, apply, ("KSampler", inputs))


def test_plain_use(second):
    assert status_of(second, second.queue(with_table(1))) == "success"


def test_the_next_prompt_runs(second):
    """After a remark on cfg, a λ that is not applied, and a row that is missing; the worst comes last."""
    remarks = [second.queue(graph) for graph in (with_table(2, cfg=7.0), applied(3, steps=9))]
    missing = second.queue(with_table(4, steps=7, strict=True))
    last = second.queue(with_stock(5))
    assert [status_of(second, each) for each in remarks] == ["success", "success"]
    assert status_of(second, missing) == "error"
    assert status_of(second, last) == "success"


def status_of(server: ComfyServer, prompt_id: str) -> str:
    """How a graph ended; "thread died" as soon as nothing will run any more."""

    def ended() -> str | None:
        if "Exception in thread" in server.log:
            return "thread died"
        entry = server.get(f"/history/{prompt_id}").get(prompt_id)
        return entry and entry["status"]["status_str"]

    return server.wait(ended, SECONDS)


def test_two_servers_save_into_one_folder_and_nothing_is_lost(server, second):
    """Tables of the same numbers, which want the same name."""
    folder = server.pack / "lambdas"
    code = {
        "class_type": "DODE_ImportLambdas",
        "inputs": {"code": to_code(LambdaTable([LambdaRow("euler", [1.0, 0.5, 0.0], (1, 1), [0.0, 0.1])]))},
    }

    def save(author: str) -> dict[str, Any]:
        words = {"rows": "", "author": author, "licence": "", "notes": "", "model_name": ""}
        inputs = {"table": ["code", 0], "save_name": "shared"} | words
        return {"code": code, "save": {"class_type": "DODE_SaveLambdas", "inputs": inputs}}

    authors = {f"{number}" for number in range(30)}
    shutil.rmtree(second.pack / "lambdas")
    (second.pack / "lambdas").symlink_to(folder)
    servers = (server, second)
    queued = [(servers[int(author) % 2], author) for author in authors]
    results = [(at, at.queue(save(author))) for at, author in queued]
    for at, prompt_id in results:
        succeeded(at.result(prompt_id))
    saved = [LambdaTable.load(path) for path in folder.glob("shared-*.safetensors")]
    assert sorted(table.rows[0].credit.author for table in saved) == sorted(authors)
    assert not list(folder.glob(".*.part"))
