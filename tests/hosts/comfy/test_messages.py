"""Words on the node: they are text, whatever a table holds."""

from __future__ import annotations

import dataclasses

import pytest

from dode_nodes import LambdaTable
from tests.hosts.comfy.node_calls import empty, ksampler, zero_table

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("pack")]

MARKUP = "<img src=x onerror=alert(1)>"


def test_markup_is_sent_as_text(on_the_node):
    from dode_nodes.hosts.comfy.messages import remark, show_text

    show_text("7", f"saved as {MARKUP} &amp; done")
    remark("7", [MARKUP, "a second remark"])
    assert on_the_node == [
        "saved as ‹img src=x onerror=alert(1)› ＆amp; done",
        "‹img src=x onerror=alert(1)›; a second remark",
    ]


def test_all_remarks_of_one_run_of_the_graph_stand_on_the_node(on_the_node, caplog):
    """The front end has one line for a node, which each text replaces."""
    import server

    from dode_nodes.hosts.comfy.messages import remark, show_text

    server.PromptServer.instance.last_prompt_id = "one"
    remark("7", ["made for another checkpoint"])
    show_text("7", "teacher: 3 of 9")
    remark("8", ["of another node"])
    remark("7", ["this is cfg 6", "made for another checkpoint"])
    remark("7", [])
    remark("7", [], "saved as a")
    server.PromptServer.instance.last_prompt_id = "two"
    remark("7", ["this is cfg 1"])
    assert on_the_node == [
        "made for another checkpoint",
        "teacher: 3 of 9",
        "of another node",
        *["made for another checkpoint; this is cfg 6"] * 2,
        "saved as a; made for another checkpoint; this is cfg 6",
        "this is cfg 1",
    ]
    assert "saved as a" not in caplog.text


def test_a_patched_model_says_what_is_wrong_with_its_table_at_every_run(make_model, dode, on_the_node):
    """Of a second prompt only the KSampler may be new, for Apply is cached."""
    import server

    server.PromptServer.instance.last_prompt_id = "one"
    table = zero_table(make_model(), "euler")
    row = dataclasses.replace(table.rows[0], settings={"latent_shape": [4, 32, 32]})
    patched = dode.apply(make_model(), dataclasses.replace(table, rows=[row]))
    for prompt in ("one", "two"):
        server.PromptServer.instance.last_prompt_id = prompt
        ksampler(patched, empty())
        assert "another checkpoint of this family" in on_the_node[-1]
        assert "distilled at 256×256, this is 32×32" in on_the_node[-1]


def test_a_strangers_table_brings_no_markup(make_model, dode, on_the_node):
    """A row may name its solver <word>, as functions are named: that must not become a tag."""
    model = make_model()
    row = dataclasses.replace(zero_table(model, "euler").rows[0], solver="<marquee>")
    ksampler(dode.apply(model, LambdaTable([row])), empty())
    (line,) = on_the_node
    assert "‹marquee›, 8 steps" in line
    assert not set("<>&") & set(line)


def test_a_time_is_said_in_words_that_suit_it():
    from dode_nodes.fit.progress import in_words

    assert [in_words(seconds) for seconds in (0.2, 99, 100, 3599, 11100)] == [
        "0 s", "99 s", "2 min", "1 h 0 min", "3 h 5 min",
    ]  # fmt: skip
