"""Texts in other files than the nodes' own: locales and help pages."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from tests.hosts.comfy.locales import english, read
from tests.import_comfyui import REPOSITORY

pytestmark = pytest.mark.comfyui

DOCS = REPOSITORY / "web" / "docs"


@pytest.fixture(scope="module")
def nodes(pack: SimpleNamespace) -> list[Any]:
    return list(vars(pack).values())


def leaves(texts: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Every text, by where it stands."""
    if isinstance(texts, str):
        return {path: texts}
    return {
        where: text for key, value in texts.items() for where, text in leaves(value, (*path, key)).items()
    }


def test_english_says_what_the_nodes_say(nodes):
    """If not: python -m tests.hosts.comfy.locales"""
    assert read("en", "nodeDefs") == english(nodes)


@pytest.mark.parametrize("name", ["main", "nodeDefs"])
def test_chinese_has_every_text(name):
    ours, theirs = leaves(read("en", name)), leaves(read("zh", name))
    assert theirs.keys() == ours.keys()
    assert all(text.strip() for text in theirs.values())
    untranslated = [
        path for path in ours if path[-1] in ("tooltip", "description") and ours[path] == theirs[path]
    ]
    assert untranslated == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_character_has_a_meaning_to_the_front_end(language):
    """vue-i18n reads these as variables, links and plurals."""
    texts = leaves(read(language, "nodeDefs")) | leaves(read(language, "main"))
    assert [text for text in texts.values() if re.search(r"[{}@|]", text)] == []


def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(nodes):
    schemas = [node.GET_SCHEMA() for node in nodes]
    assert {path.stem for path in DOCS.glob("*.md")} == {schema.node_id for schema in schemas}
    for schema in schemas:
        page = (DOCS / f"{schema.node_id}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema.display_name}\n")
        for each in [*schema.inputs, *schema.outputs]:
            assert f"**{each.display_name or each.id}**" in page, f"{schema.node_id}: {each.id}"


def test_help_pages_pictures_exist():
    for page in DOCS.glob("*.md"):
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (DOCS / picture).is_file(), f"{page.name}: {picture}"


def test_chinese_help_pages_have_the_parts_of_the_english_ones():
    """If not, translate what has changed."""
    headings, items, pictures = r"^#+(?= )", r"^ *(?:-|\d+\.)(?= )", r"!\[[^\]]*\]\(([^)]+)\)"
    assert {path.parent.name for path in DOCS.glob("*/zh.md")} == {path.stem for path in DOCS.glob("*.md")}
    for page in DOCS.glob("*.md"):
        english_page = page.read_text(encoding="utf-8")
        chinese_page = (DOCS / page.stem / "zh.md").read_text(encoding="utf-8")
        for part in (headings, items, pictures):
            theirs, ours = (re.findall(part, text, re.MULTILINE) for text in (chinese_page, english_page))
            assert theirs == ours, page.name
