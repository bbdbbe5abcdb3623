"""What people type into the search for nodes."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.comfyui

WORDS = ["few steps", "fast", "speed", "sampler", "solver", "refine", "schedule"]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_that_people_search_for_finds_a_node(word, pack):
    schemas = [node.define_schema() for node in vars(pack).values()]
    if not any(getattr(schema, "search_aliases", None) for schema in schemas):
        pytest.skip("this ComfyUI's search knows names only")
    texts = [" ".join([schema.display_name, *schema.search_aliases]).lower() for schema in schemas]
    assert any(word in text for text in texts)


def test_where_the_host_has_no_aliases_nodes_are_made_without(pack, monkeypatch):
    from dode_nodes.hosts.comfy.nodes import inputs

    monkeypatch.setattr(inputs, "fields", lambda of: ())
    made = inputs.schema(node_id="DODE_KSampler", display_name="x", category="y", inputs=[], outputs=[])
    assert not getattr(made, "search_aliases", None)
