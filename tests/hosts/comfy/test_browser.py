"""What people see: the example workflows, the help, the texts, and a stranger's table, in Chromium on a real server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import browser
from tests.hosts.comfy.hostile import graph, hostile_tables
from tests.hosts.comfy.locales import read
from tests.server import ComfyServer
from tests.workflows import NAMES, changes_for, read_example, to_prompt

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]

SCRIPT = Path(__file__).parent / "browser" / "check.mjs"
FIRST = "1_first_steps"
RENDERINGS = ("canvas without previews", "vue without previews", "vue")
SMALL = {"EmptyLatentImage": {"width": 64, "height": 64}}
SECONDS = 900


@pytest.fixture(scope="module")
def report(server: ComfyServer) -> dict[str, Any]:
    """What check.mjs found. Screenshots go to $DODE_SCREENSHOTS, if that is set."""
    if lacking := browser.missing():
        pytest.skip(f"no browser tests: {lacking}")
    with hostile_tables(server) as (good, refused):
        info = server.get("/object_info/DODE_LoadLambdas")["DODE_LoadLambdas"]["input"]["required"]["name"]
        assert {good, refused} <= set(info[1]["options"])
        bad = {number: node for number, node in graph(refused).items() if number in ("1", "3", "4", "11")}
        request = {
            "url": server.url, "screenshots": os.environ.get("DODE_SCREENSHOTS"), "hostile": [graph(good), bad],
            "workflows": {name: {"workflow": read_example(name), "changes": _changes(name, 1)} for name in NAMES},
            "renderings": {
                "workflow": read_example(FIRST),
                "changes": {name: _changes(FIRST, seed) | SMALL for seed, name in enumerate(RENDERINGS, 2)},
            },
        }  # fmt: skip
        done = subprocess.run(
            ["node", SCRIPT], input=json.dumps(request), text=True, capture_output=True, timeout=SECONDS,
            env=browser.node_environment(),
        )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr}\n{server.log[-3000:]}"
    return json.loads(done.stdout)


def _changes(name: str, seed: int) -> dict[str, Any]:
    """Another seed than the server tests have: a fit that they have finished would not be made again."""
    changes = changes_for(name)
    distil = changes.get("DODE_DistillLambdas", {}) | {"seed": seed}
    return changes | {"DODE_DistillLambdas": distil}


@pytest.mark.parametrize("name", NAMES)
def test_example_loads_runs_and_shows_its_pictures(name, report):
    facts = report["workflows"][name]
    assert facts["missing"] == []
    assert facts["failure"] is None, facts["failure"]
    assert facts["errors"] == []
    assert facts["pictures"]
    for node in facts["pictures"]:
        assert node["widths"], f"{node['type']} shows nothing"
        assert all(width > 0 for width in node["widths"]), node
        assert node["previews"] == 0, f"{node['type']} still shows a live preview"


def test_live_previews_are_shown_meanwhile(report):
    assert {"DODE_DistillLambdas", "DODE_Compare"} <= set(report["workflows"][FIRST]["previewed"])


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_the_result_is_seen_instead_of_previews_and_without_them(rendering, report):
    facts = report["renderings"][rendering]
    if facts is None:
        pytest.skip("this front end does not offer the Vue rendering")
    assert facts["failure"] is None
    assert {"DODE_DistillLambdas", "DODE_Compare"} <= set(facts["shown"])
    for node, pictures in facts["shown"].items():
        assert pictures, f"{node} shows nothing"
        assert all("/view?" in picture for picture in pictures), f"{node} still shows a live preview"


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_lie_on_each_other(name, report):
    assert report["workflows"][name]["overlaps"] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_front_end_makes_the_prompt_that_the_server_tests_post(name, report, server):
    made = {
        number: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for number, node in report["workflows"][name]["prompt"].items()
    }
    assert made == to_prompt(read_example(name), server.get("/object_info"))


def test_a_graph_of_an_earlier_version_is_told_where_its_inputs_went(report):
    assert "solver, scheduler" in report["older"]
    assert "inputs of 'Distill λ options' now" in report["older"]


def test_running_again_does_not_distil_again(report):
    again = report["again"]
    assert again["seeds"][0] == again["seeds"][1]
    assert "DODE_DistillLambdas" in again["cached"]


def test_a_new_distill_node_keeps_its_seed(report):
    """The front end gives an input called seed a control that draws a new one after every run."""
    assert "seed" in report["help"]["widgets"]
    assert "control_after_generate" not in report["help"]["widgets"]


def test_help_shows_our_page_with_its_picture(report):
    assert report["help"]["text"].startswith("Distill λ")
    assert "If something goes wrong" in report["help"]["text"]
    assert report["help"]["widths"]
    assert all(width > 0 for width in report["help"]["widths"])


def test_names_are_chinese_where_the_language_is(report):
    texts = read("zh", "nodeDefs")["DODE_KSampler"]
    assert report["chinese"]["title"] == texts["display_name"]
    slots = [*texts["inputs"].values(), *texts["outputs"].values()]
    assert sorted(report["chinese"]["names"]) == sorted(slot["name"] for slot in slots)


def test_nothing_of_a_strangers_table_runs_or_breaks_anything(report):
    hostile = report["hostile"]
    assert hostile["ran"] == []
    assert hostile["elements"] == 0
    ran, refusal = hostile["failures"]
    assert ran is None
    assert "a row's solver must be a name" in json.dumps(refusal)
    assert hostile["errors"] == []


def test_no_console_error_of_ours(report):
    assert report["errors"] == []
