"""Which table is taken for a model: by what it is for, never by what it claims; and at what cost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dode_nodes.errors import DodeError
from dode_nodes.tables import auto, safefile
from dode_nodes.tables.auto import Wanted, choose, pin_of, pinned
from dode_nodes.tables.fingerprint import fingerprint
from dode_nodes.tables.model_check import check_facts
from dode_nodes.tables.provenance import HeldOutErrors, Origin
from dode_nodes.tables.shelf import Shelf
from dode_nodes.tables.table import LambdaTable
from dode_nodes.tables.trust import Trust, shipped_hashes
from tests.tables.rows import BEGAN, row_of


def marks(seed: int, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return fingerprint([torch.randn(64, 32, generator=generator).to(dtype) for _ in range(60)])


MODEL = {"family": "sdxl", "prediction_type": "eps", "channels": 4, "shift": None, "sigma_min": 0.03, "sigma_max": 14.6,
         "fingerprint": marks(0), "patches": {"weights": 0, "strengths": []}}  # fmt: skip
SETTINGS = {"cfg": 7.0, "latent_shape": [4, 128, 128], "steps": 3}


class Folder:
    """A shelf over one folder, and who is trusted."""

    def __init__(self, path: Path) -> None:
        self.path = path / "lambdas"
        self.path.mkdir()
        self.shelf = Shelf(lambda: [self.path])
        self.trust = Trust(path / "trusted.txt")
        self._number = 0

    def put(self, name, model=(), *, trusted=True, settings=(), **facts) -> LambdaTable:
        """A table of a row of its own numbers."""
        self._number += 1
        weights = np.full(3, self._number / 100)
        row = row_of(**({"weights": weights, "settings": SETTINGS | dict(settings)} | facts))
        table = LambdaTable([row], MODEL | dict(model), name=name)
        table.save(self.path / f"{name}.safetensors")
        if trusted:
            self.trust.add(table)
        return table

    def choose(self, **wanted) -> auto.Chosen:
        given = {"model": MODEL, "steps": 3, "cfg": 7.0, "size": (128, 128)} | wanted
        return choose(self.shelf, self.trust, Wanted(**given))


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


# --- What is chosen -----------------------------------------------------------------------------------


def test_a_table_of_this_checkpoint_is_taken_and_said(folder):
    folder.put("a-other", {"fingerprint": marks(1)})
    mine = folder.put("z-mine")
    chosen = folder.choose()
    assert chosen.table == mine
    assert chosen.why == f"λ table z-mine {mine.sha256[:8]}: made for this checkpoint"


@pytest.mark.parametrize(
    "model",
    [{"family": "sd15"}, {"prediction_type": "v"}, {"channels": 16}, {"sigma_max": 80.0}, {"sigma_min": 0.002}],
    ids=str,
)  # fmt: skip
def test_other_kinds_of_models_are_never_taken(folder, model):
    folder.put("other", model)
    with pytest.raises(DodeError, match="there is none for models of the family sdxl"):
        folder.choose()


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (True, "made for this checkpoint"),
        (False, "only a family match, made for another checkpoint of sdxl"),
        (None, "only a family match, made for perhaps another checkpoint of sdxl"),
    ],
)
def test_a_host_may_tell_checkpoints_apart_by_itself(folder, told, why):
    """As ComfyUI does for the fingerprints of the first tables, which no sample is in."""
    old = folder.put("b", {"fingerprint": {"layout": "x", "values": [1.0]}})
    by_samples = folder.put("a")
    assert folder.choose().table == by_samples
    asked = []

    def same(theirs):
        asked.append(theirs)
        return told if theirs == old.model["fingerprint"] else False

    chosen = choose(folder.shelf, folder.trust, Wanted(MODEL, steps=3), same)
    assert chosen.table == (old if told else by_samples)
    assert chosen.why.endswith(why if told else "made for another checkpoint of sdxl")
    assert by_samples.model["fingerprint"] in asked
    (folder.path / "a.safetensors").unlink()
    chosen = choose(folder.shelf, folder.trust, Wanted(MODEL, steps=3), same)
    assert chosen.why.endswith(why)
    if not told:
        with pytest.raises(DodeError, match="there is none for this checkpoint"):
            choose(folder.shelf, folder.trust, Wanted(MODEL, steps=3, family=False), same)


def test_a_table_that_does_not_say_its_family_is_not_taken_unasked(folder):
    table = LambdaTable([row_of(settings=SETTINGS)], {"name": "any"})
    table.save(folder.path / "any.safetensors")
    folder.trust.add(table)
    with pytest.raises(DodeError, match="there is none"):
        folder.choose()


def test_a_match_of_the_family_is_named_as_such_and_can_be_switched_off(folder):
    folder.put("other", {"fingerprint": marks(1), "name": "dream.safetensors"})
    why = folder.choose().why
    assert why.endswith("only a family match, made for another checkpoint of sdxl (dream.safetensors)")
    with pytest.raises(DodeError, match="there is none for this checkpoint in your lambdas folders"):
        folder.choose(family=False)
    unknown = folder.put("a-unknown", {"fingerprint": {}})
    assert folder.choose().table == unknown
    assert "made for perhaps another checkpoint" in folder.choose().why


BETTER = {
    "the checkpoint": ({"model": {"fingerprint": marks(1)}}, {"settings": {"cfg": 1.0}}),
    "another number format": (
        {"model": {"fingerprint": marks(1)}}, {"model": {"fingerprint": marks(0, torch.float16)}},
    ),
    "patches": ({"model": {"patches": {"weights": 9, "strengths": [1.0]}}}, {"settings": {"cfg": 1.0}}),
    "shift": ({"model": {"shift": 3.0}}, {"settings": {"cfg": 1.0}}),
    "cfg": ({"settings": {"cfg": 4.0}}, {"settings": {"latent_shape": [4, 32, 32]}}),
    "a range of cfg": ({"settings": {"cfg": 5.0}}, {"settings": {"cfg": 2.0, "cfg_range": [2.0, 8.0]}}),
    "size": ({"settings": {"latent_shape": [4, 32, 32]}}, {"settings": {"latent_shape": [4, 120, 130]}}),
}  # fmt: skip


def patches(content: str | None, strength: float = 1.0, weights: int = 9) -> dict:
    """Of LoRAs or other patches on a model; what they are known by is one letter 64 times."""
    known = {} if content is None else {"content": content * 64}
    return {"patches": {"weights": weights, "strengths": [strength]} | known}


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (patches("b"), patches("a")),
        (patches("b"), patches("a", 0.5)),
        (patches("a", 0.5), patches("a")),
        (patches(None), patches("a", 0.5)),
        (patches("b"), patches(None)),
        (patches(None, 0.5), patches(None)),
        (patches("b"), {"patches": None}),
    ],
    ids=str,
)
def test_loras_are_told_by_what_is_in_them_then_by_their_strengths(folder, worse, better):
    """And if that is not known, by how many weights they are on."""
    model = MODEL | patches("a")
    for name, each in (("a", worse), ("z", better)):
        table = LambdaTable(
            [row_of(weights=np.full(3, ord(name) / 1000), settings=SETTINGS)],
            {key: value for key, value in (MODEL | each).items() if value is not None},
        )
        table.save(folder.path / f"{name}.safetensors")
        folder.trust.add(table)
    assert folder.choose(model=model).table.name == "z"


@pytest.mark.parametrize(
    ("theirs", "remark"),
    [
        (patches("a"), None),
        (patches("a", 0.5), "the same LoRAs or patches at other strengths"),
        (patches("b"), "different LoRAs"),
        (patches("a", weights=8), "the same LoRAs"),
        (patches(None), None),
        (patches(None, weights=8), "different LoRAs"),
        ({}, None),
    ],
    ids=str,
)
def test_other_loras_and_other_strengths_are_said(theirs, remark):
    told = check_facts(theirs, MODEL | patches("a"), True)
    assert len(told) == (remark is not None)
    assert remark is None or remark in told[0]


@pytest.mark.parametrize(("worse", "better"), BETTER.values(), ids=BETTER)
def test_what_counts_in_this_order(folder, worse, better):
    model = MODEL | {"shift": 1.0}
    worse, better = ({"model": {"shift": 1.0} | dict(each.get("model", {})), **{
        name: value for name, value in each.items() if name != "model"
    }} for each in (worse, better))  # fmt: skip
    folder.put("a", **worse)
    best = folder.put("z", **better)
    assert folder.choose(model=model).table == best


def test_stated_errors_never_count(folder):
    honest = folder.put("a-honest", errors=HeldOutErrors(4, (0.5, None, None)))
    folder.put("b-boasting", errors=HeldOutErrors(4, (0.0, None, None)))
    assert folder.choose().table == honest
    boasting = folder.path / "b-boasting.safetensors"
    content = boasting.read_bytes()
    forged = content.replace(b"[0.0, null", b"[-01, null").replace(b'\\"latents\\": 4', b'\\"latents\\": 9')
    assert forged != content
    boasting.write_bytes(forged)
    assert folder.choose().table == honest


def test_steps_and_solver_must_be_there(folder):
    other = folder.put("other")
    with pytest.raises(
        DodeError, match=rf"distil a table with 7 steps, or choose steps .*: other {other.sha256[:8]} has"
    ):
        folder.choose(steps=7)
    with pytest.raises(DodeError, match="with 3 steps for heun"):
        folder.choose(solver="heun")
    five = folder.put("five", settings={"steps": 5, "cfg": 1.0})
    assert folder.choose(steps=5).table == five
    assert folder.choose(steps=None, cfg=None, size=None).table == five  # by name, among equals


def test_a_refined_table_is_taken_for_any_solver_and_for_the_one_that_it_began_with(folder):
    refined = folder.put("refined", weights=np.tri(3), form="history", origin=Origin("refined", **BEGAN))
    for solver in (None, "euler", BEGAN["solver"]):
        assert folder.choose(solver=solver).table == refined
    with pytest.raises(DodeError, match="with 3 steps for heun"):
        folder.choose(solver="heun")


# --- Trust --------------------------------------------------------------------------------------------


def test_a_strangers_table_is_taken_once_it_was_picked(folder):
    table = folder.put("stranger", trusted=False)
    with pytest.raises(DodeError, match="pick the λ table stranger once in Load λ table to allow it"):
        folder.choose()
    with pytest.raises(DodeError, match="pick the λ table stranger once"):
        pinned(folder.shelf, folder.trust, pin_of(table))
    folder.trust.add(table)
    assert folder.choose().table == table
    assert Trust(folder.path.parent / "trusted.txt").__contains__(table.sha256)
    other = folder.put("other numbers", trusted=False)
    os.replace(folder.path / "other numbers.safetensors", folder.path / "stranger.safetensors")
    assert other.sha256 not in folder.trust
    with pytest.raises(DodeError, match="pick the λ table stranger once"):
        folder.choose()


def test_shipped_tables_are_trusted(tmp_path):
    table = LambdaTable([row_of()])
    assert table.sha256 in Trust(tmp_path / "none", frozenset({table.sha256}))
    assert table.sha256 not in Trust(tmp_path / "none")


def test_a_table_is_noted_once(tmp_path):
    trust, table = Trust(tmp_path / "trusted.txt"), LambdaTable([row_of()])
    for _ in range(2):
        trust.add(table)
    assert (tmp_path / "trusted.txt").read_text() == f"{table.sha256}\n"


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_page_that_cannot_be_read_lists_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "README.md").write_bytes(content)
    assert shipped_hashes(tmp_path / "README.md") == frozenset()


def test_what_cannot_be_noted_is_no_failure(tmp_path, caplog):
    (tmp_path / "file").touch()
    trust = Trust(tmp_path / "file" / "trusted.txt")
    trust.add(LambdaTable([row_of()]))
    assert "cannot note" in caplog.text


@pytest.mark.parametrize("content", [b"\xff\x00garbage\n", b"0" * 5_000_000, b"ABC\n\n"])
def test_an_odd_file_trusts_nobody(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    trust = Trust(tmp_path / "t")
    table = LambdaTable([row_of()])
    assert table.sha256 not in trust
    trust.add(table)


# --- Pins ---------------------------------------------------------------------------------------------


def test_a_pinned_graph_gets_its_table_whatever_else_comes(folder):
    old = folder.put("mine", settings={"cfg": 1.0})
    pin = pin_of(old)
    assert pin == f"mine {old.sha256[:16]}"
    better = folder.put("a-better")
    assert folder.choose().table == better
    assert pinned(folder.shelf, folder.trust, pin).table == old
    os.replace(folder.path / "mine.safetensors", folder.path / "renamed.safetensors")
    chosen = pinned(folder.shelf, folder.trust, pin)
    assert chosen.table == old
    assert chosen.why == f"λ table renamed {old.sha256[:8]}: this graph is pinned to it"
    (folder.path / "renamed.safetensors").unlink()
    with pytest.raises(
        DodeError, match=rf"pinned to the λ table '{pin}', which is not in your lambdas folders"
    ):
        pinned(folder.shelf, folder.trust, pin)


@pytest.mark.parametrize("pin", ["", "mine", "mine 123", "mine " + "g" * 16, "<img>" * 1000])
def test_what_is_no_pin_is_refused(folder, pin):
    with pytest.raises(DodeError, match="clear 'preset'"):
        pinned(folder.shelf, folder.trust, pin)


# --- Cost ---------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch):
    """The files that are opened."""
    paths = []
    opens = safefile._opened
    monkeypatch.setattr(safefile, "_opened", lambda path: paths.append(Path(path)) or opens(path))
    return paths


def test_changed_new_and_removed_files_are_noticed_and_no_other_is_opened(folder, opened):
    first = folder.put("b")
    folder.put("other", {"family": "flux"})
    stamp = folder.shelf.stamp
    assert not opened
    assert folder.choose().table == first
    assert {path.stem for path in opened} == {"b", "other"}
    opened.clear()
    assert folder.shelf.stamp == stamp
    assert folder.choose().table == first
    assert folder.choose(cfg=3.0).table == first
    assert not opened

    new = folder.put("a")
    assert folder.shelf.stamp != stamp
    assert folder.choose().table == new
    assert {path.stem for path in opened} == {"a"}
    changed = replace(new, rows=[row_of(weights=np.ones(3), settings=SETTINGS)])
    changed.save(folder.path / "a.safetensors", overwrite=True)
    folder.trust.add(changed)
    assert folder.choose().table == changed
    (folder.path / "a.safetensors").unlink()
    opened.clear()
    assert folder.choose().table == first
    assert not opened


def test_files_that_are_no_tables_are_passed_over(folder):
    mine = folder.put("mine")
    for name, content in (("bad", b"bad"), ("empty", b""), ("lora", b"\x02\0\0\0\0\0\0\0{}")):
        (folder.path / f"{name}.safetensors").write_bytes(content)
    os.mkfifo(folder.path / "pipe.safetensors")
    (folder.path / "loop").symlink_to(folder.path)
    assert folder.choose().table == mine


def test_folders_below_are_looked_through(folder):
    mine = folder.put("mine")
    below = folder.path / "sdxl" / "fast"
    below.mkdir(parents=True)
    os.replace(folder.path / "mine.safetensors", below / "mine.safetensors")
    assert folder.choose().table == mine


def with_facts(folder: Folder, name: str, change: Callable[[str], str]) -> None:
    """A file's JSON changed as text."""
    path = folder.path / f"{name}.safetensors"
    tensors, metadata = safefile.read(path)
    safefile.write(path, tensors, metadata | {"table": change(metadata["table"])}, overwrite=True)


@pytest.mark.parametrize("cfg", ["-7.0", "0", "1e999", "1e-999", "1e", "-"])
def test_no_number_in_a_file_ends_a_choice(folder, cfg):
    """However odd: it is read before the file is checked."""
    mine = folder.put("mine")
    folder.put("odd")
    with_facts(folder, "odd", lambda text: text.replace('"cfg": 7.0', f'"cfg": {cfg}'))
    assert folder.choose().table == mine
    assert folder.choose(cfg=0.0).table.name in ("mine", "odd")


def test_a_folder_that_is_not_there_has_no_tables(folder, tmp_path):
    mine = folder.put("mine")
    shelf = Shelf(lambda: [tmp_path / "gone", folder.path])
    assert choose(shelf, folder.trust, Wanted(MODEL)).table == mine


def test_a_file_that_another_program_wrote_is_found(folder):
    """Its JSON has no blanks, so that no family is seen before it is loaded."""
    mine = folder.put("mine")
    with_facts(folder, "mine", lambda text: json.dumps(json.loads(text), separators=(",", ":")))
    assert folder.choose(solver="euler").table == mine
    with pytest.raises(DodeError, match="there is none for models of the family flux"):
        folder.choose(model=MODEL | {"family": "flux"})


@pytest.mark.parametrize(("depth", "is_found"), [(8, True), (9, False)])
def test_folders_are_looked_through_so_deep(folder, depth, is_found):
    """A link that leads back would have no end."""
    folder.put("mine")
    below = folder.path.joinpath(*["x"] * depth)
    below.mkdir(parents=True)
    os.replace(folder.path / "mine.safetensors", below / "mine.safetensors")
    if is_found:
        assert folder.choose().table.name == "mine"
    else:
        with pytest.raises(DodeError, match="connect a λ table"):
            folder.choose()


@pytest.mark.parametrize(
    ("others", "asked"),
    [
        ({"settings": {"cfg": 1.0}}, {}),
        ({"settings": {"steps": 4}, "sigmas": (8.0, 4.0, 2.0, 1.0, 0.0), "weights": None}, {}),
        ({"solver": "heun", "evaluations": (2, 2, 1), "weights": None}, {"solver": "euler"}),
        ({"model": {"patches": {"weights": 9, "strengths": [1.0]}}}, {}),
        ({"model": {"fingerprint": marks(1)}}, {}),
        ({"trusted": False}, {}),
        ({"model": {"fingerprint": marks(1)}, "trusted": False}, {}),
    ],
    ids=["cfg", "steps", "solver", "patches", "checkpoint", "trust", "checkpoint and trust"],
)
def test_the_best_is_found_behind_many_others_and_no_file_is_opened_for_the_next_choice(
    folder, others, asked, opened
):
    folder.put("a", **others)
    content = (folder.path / "a.safetensors").read_bytes()
    for i in range(40 if others == {"trusted": False} else 70):  # who is trusted is not seen at a first look
        (folder.path / f"b{i}.safetensors").write_bytes(content)
    mine = folder.put("z-mine")
    assert folder.choose(**asked).table == mine
    opened.clear()
    assert folder.choose(**asked).table == mine
    assert not opened


def test_another_checkpoint_is_looked_for_in_every_file_once_more(folder, opened):
    """Which files are its own is not known from the choice for the one before."""
    other = marks(2)
    folder.put("a", {"fingerprint": marks(1)})
    content = (folder.path / "a.safetensors").read_bytes()
    for i in range(70):
        (folder.path / f"b{i}.safetensors").write_bytes(content)
    mine = folder.put("z-mine", {"fingerprint": other})

    def chosen(model):
        def same(theirs):  # comparing numbers takes long
            return theirs == model["fingerprint"]

        return choose(folder.shelf, folder.trust, Wanted(model, steps=3), same)

    assert "only a family match" in chosen(MODEL).why
    assert chosen(MODEL | {"fingerprint": other}).table == mine
    opened.clear()
    assert chosen(MODEL | {"fingerprint": other}).table == mine
    assert not opened


def test_of_hundreds_that_will_not_do_few_are_loaded_and_the_next_choice_opens_none(folder, opened):
    content = folder.put("a", trusted=False)
    for i in range(200):
        content.save(folder.path / f"b{i}.safetensors")
    for _ in range(2):
        opened.clear()
        with pytest.raises(DodeError, match="pick the λ table a, b0, b1 once"):
            folder.choose()
    assert not opened


def test_of_many_tables_that_all_are_of_this_checkpoint_few_are_loaded(folder, opened):
    """Each header is read once; the first of equals is taken."""
    folder.put("a")
    content = (folder.path / "a.safetensors").read_bytes()
    for i in range(100):
        (folder.path / f"b{i}.safetensors").write_bytes(content)
    opened.clear()
    assert folder.choose().table.name == "a"
    assert len(opened) <= 101 + 12
    opened.clear()
    assert folder.choose(cfg=6.5).table.name == "a"
    assert not opened


def test_two_thousand_files_are_opened_once_and_then_not_again(folder, opened):
    families = ["sd15", "flux", "wan", "sdxl", "qwen-image"]
    content = {}
    for family in families:
        table = folder.put(family, {"family": family, "fingerprint": marks(1)})
        content[family] = (folder.path / f"{family}.safetensors").read_bytes()
        folder.trust.add(table)
    for i in range(2000 - len(families)):
        (folder.path / f"{i}.safetensors").write_bytes(content[families[i % 5]])
    mine = folder.put("mine")
    opened.clear()
    assert folder.choose().table == mine
    assert len(opened) <= 2001 + 12  # each once, and those in front whole
    opened.clear()
    assert folder.choose(cfg=6.5).table == mine
    assert not opened
