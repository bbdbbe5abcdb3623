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
