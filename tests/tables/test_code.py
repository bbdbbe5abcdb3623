"""A table as a line of text: the same to the bit, and whatever else is pasted is refused with a reason."""

from __future__ import annotations

import string
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dode_nodes.errors import DodeError, TableError
from dode_nodes.tables import code
from dode_nodes.tables.code import LONGEST, from_code, to_code
from dode_nodes.tables.fingerprint import fingerprint, same_checkpoint
from dode_nodes.tables.free_outputs import FreeOutputs, GaussianPrior
from dode_nodes.tables.provenance import HeldOutErrors, Origin
from dode_nodes.tables.row import LambdaRow
from dode_nodes.tables.table import LambdaTable
from tests.tables import rows
from tests.tables.rows import row_of

MODEL = {"family": "sdxl", "prediction_type": "eps", "channels": 4, "shift": None, "sigma_min": 0.0291675,
         "sigma_max": 14.614642, "name": "mine", "patches": {"weights": 0, "strengths": []}}  # fmt: skip


def wide_row(steps=8, bands=2, channels=0, **facts):
    """A refined row of everything: bands, a free first step, the start, and a Gaussian denoiser."""
    random = np.random.default_rng(0)
    roots = random.normal(size=(2, channels, channels))
    prior = (
        GaussianPrior(random.normal(size=channels), roots @ roots.transpose(0, 2, 1)) if channels else None
    )
    free = FreeOutputs(first=True, start=True, gaussian=prior)
    weights = np.tril(random.normal(size=(bands, steps + 1, free.columns + steps + 1)), free.columns)
    weights = np.triu(weights, free.columns - 3) + np.tril(weights, -steps + 1)
    sigmas = np.append(np.geomspace(14.6, 0.03, steps + 1), 0)
    origin = Origin("refined", "ipndm", {"max_order": 3}, np.append(np.geomspace(14.6, 0.1, steps), 0))
    return LambdaRow(
        "euler", sigmas, (1,) * (steps + 1), weights, form="history", free=free, origin=origin,
        settings={"cfg": 7.5, "steps": steps, "scheduler": "karras", "latent_shape": [4, 128, 128], "seed": 3}, **facts,
    )  # fmt: skip


def test_the_code_of_a_wide_row_is_one_line_and_holds_its_numbers():
    table = LambdaTable([wide_row(channels=4, report={"checked": True})], MODEL, name="mine")
    text = to_code(table)
    assert len(text) <= LONGEST
    assert set(text) <= set(string.ascii_letters + string.digits)
    again = from_code(text)
    assert again.sha256 == table.sha256
    (row,) = again.rows
    (own,) = table.rows
    assert (row.requires, row.origin.to_json()) == (own.requires, own.origin.to_json())
    assert row.settings == {"cfg": 7.5, "steps": 8, "scheduler": "karras", "latent_shape": [4, 128, 128]}
    assert again.model == {name: MODEL[name] for name in MODEL if name not in ("name", "patches", "shift")}
    assert not row.report
    assert again.name == ""


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(table=rows.tables)
def test_any_table_that_fits_comes_back_as_it_samples(table):
    try:
        text = to_code(table)
    except DodeError as error:
        assert "share the file" in str(error)  # noqa: PT017
        return
    again = from_code(text)
    assert again.sha256 == table.sha256
    for row, own in zip(again.rows, table.rows, strict=True):
        assert row.origin.to_json() == own.origin.to_json()
        assert row.plain.sha256 == own.plain.sha256
        if len(table.rows) > 1:
            assert [row.error_from(i) for i in range(row.steps)] == [
                own.error_from(i) for i in range(own.steps)
            ]
    assert to_code(again) == text


@settings(max_examples=20, deadline=None)
@given(blanks=st.lists(st.sampled_from([" ", "\n", "\t", "\r\n", "\u00a0"]), min_size=1, max_size=9))
def test_blanks_do_not_count(blanks):
    text = to_code(LambdaTable([row_of()]))
    step = max(1, len(text) // len(blanks))
    pasted = "".join(text[i : i + step] + blanks[i // step % len(blanks)] for i in range(0, len(text), step))
    assert from_code(f"\n {pasted} ").sha256 == LambdaTable([row_of()]).sha256


def test_minus_zero_is_a_number_of_its_own():
    table = LambdaTable([row_of(weights=np.array([0.0, -0.0, 0.5]))])
    assert (
        from_code(to_code(table)).sha256 == table.sha256 != LambdaTable([row_of(weights=[0, 0, 0.5])]).sha256
    )


def test_errors_decide_between_rows_of_one_code():
    good, bad = row_of(error=(0.1, 0.5, None)), row_of(error=(0.2, 0.4, None), weights=np.zeros(3))
    again = from_code(to_code(LambdaTable([bad, good])))
    assert np.array_equal(again.match(good.sigmas).row.weights, good.weights)
    assert np.array_equal(again.match(good.sigmas[1:]).row.weights, bad.weights)


def test_a_code_tells_the_checkpoint():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(64, 32, generator=generator) for _ in range(300)]
    mine = fingerprint(weights)
    (of_code,) = [from_code(to_code(LambdaTable([row_of()], {"fingerprint": mine}))).model["fingerprint"]]
    assert 1 <= len(of_code["samples"]) <= 8
    assert same_checkpoint(of_code, mine) is True
    assert same_checkpoint(mine, of_code) is True
    moved = fingerprint(
        [weight * (1 + 0.01 * torch.randn(weight.shape, generator=generator)) for weight in weights]
    )
    other = fingerprint([torch.randn(64, 32, generator=generator) for _ in range(300)])
    assert same_checkpoint(of_code, moved) is False
    assert same_checkpoint(of_code, other) is False


def test_samples_of_weights_give_way_to_the_row():
    samples = np.random.default_rng(0).normal(size=(100, 16)).astype("f4").astype(float)
    marks = {"fingerprint": {"samples": samples.tolist(), "ascending": 0}}
    counts = []
    for steps in (4, 6, 8, 10):
        table = LambdaTable([wide_row(steps)], MODEL | marks)
        counts.append(len(from_code(to_code(table)).model.get("fingerprint", {}).get("samples", [])))
    assert counts[0] == 8
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < 8


def test_what_is_too_long_is_to_be_shared_as_a_file():
    for table, what in (
        (LambdaTable([wide_row(30)]), "this row"),
        (LambdaTable([wide_row(channels=16)]), "this row"),
        (LambdaTable([wide_row()] * 5), "these 5 rows"),
    ):
        with pytest.raises(
            DodeError, match=rf"share the file: {what} would make a code of \d+ characters, at most 1900"
        ):
            to_code(table)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "this is no λ code: a code begins with DODE1"),
        ("hello", "a code begins with DODE1"),
        ("DODE1", "incomplete, or a character of it is wrong"),
        ("DODE10", "incomplete"),
        ("DODE1" + "z" * 1896, "at most 1900 characters, this text has 1901"),
        ("DODE1" + "z" * 1895, "incomplete"),
        ("x" * 100_001, "at most 1900 characters"),
        ("DODE2abc", "begins with DODE2, and this version reads DODE1: update"),
        ("DODE1ab-c", "other characters than letters and digits"),
        ("DODE1ab\u202ec", "other characters"),
        (3, "no λ code"),
    ],
)
def test_what_is_no_code_is_refused_with_a_reason(text, why):
    with pytest.raises(TableError, match=why):
        from_code(text)


def test_a_mistyped_code_is_noticed():
    text = to_code(LambdaTable([row_of()]))
    for i in range(5, len(text), 7):
        changed = "x" if text[i] != "x" else "y"
        for wrong in (text[:i] + changed + text[i + 1 :], text[:i] + text[i + 1 :], text[:i]):
            with pytest.raises(TableError, match="copy it again"):
                from_code(wrong)


def sealed(payload: bytes, first: bytes = b"\1") -> str:
    """A code with a sum that is right, whatever is in it."""
    payload = first + payload
    return code._MARK + code._base62(payload + code._sum(payload))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_code_made_by_an_enemy_is_a_table_or_a_table_error(data):
    table = LambdaTable([wide_row(3, 1), row_of(error=0.1)], MODEL)
    payload = bytearray(code._packed(table, [])[1 : -code._SUM_BYTES])
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with suppress(TableError):
        assert from_code(
            sealed(bytes(payload[: data.draw(st.integers(len(payload) // 2, len(payload)))]))
        ).rows


@pytest.mark.parametrize(
    "facts",
    ['[]', '{}', '{"m":{},"r":{}}', '{"m":[],"r":[]}', '{"m":{"?":1},"r":[]}', '{"m":{},"r":[]}', '{"m":{},"r":[3]}',
     '{"m":{},"r":[{"s":"euler","n":1e9,"q":["lambda"],"k":"plain"}]}',
     '{"m":{},"r":[{"s":"euler","n":256,"q":["history"],"w":4,"k":"plain"}]}',
     '{"m":{},"r":[{"s":"euler","n":1,"q":["lambda"],"k":"plain","g":[64,256]}]}',
     '{"m":{},"r":[{"s":"euler","n":1,"q":["lambda"],"k":"plain","e":[true]}]}',
     '{"m":{},"r":[{"s":"euler","n":1,"q":[],"k":"plain"}]}', '{"m":{},"r":[{"s":"euler","n":1,"q":[{}],"k":"plain"}]}',
     '{"m":{},"r":[],"a":[1000000000,0]}', '{"m":{},"r":[],"a":[-1,0]}', '{"m":{},"r":[],"a":3}'],
)  # fmt: skip
def test_odd_facts_are_refused(facts):
    with pytest.raises(TableError, match=r"^λ code: "):
        from_code(sealed(len(facts).to_bytes(2, "little") + facts.encode() + bytes(600)))


def test_no_number_is_left_over():
    table = LambdaTable([row_of()])
    payload = code._packed(table, [])[1 : -code._SUM_BYTES]
    assert from_code(sealed(payload)).sha256 == table.sha256
    with pytest.raises(TableError, match="incomplete"):
        from_code(sealed(payload, first=b"\2"))
    with pytest.raises(TableError, match="too many numbers"):
        from_code(sealed(payload + bytes(8)))
    with pytest.raises(TableError, match="too few numbers"):
        from_code(sealed(payload[:-8]))


def test_a_code_never_changes():
    """What was shared once is read for ever."""
    table = LambdaTable([replace(row_of(), errors=HeldOutErrors(4, (0.1, None, None)))], {"family": "sd15"})
    assert from_code(WRITTEN).sha256 == table.sha256
    assert to_code(table) == WRITTEN


WRITTEN = "DODE1v9KwgMHuvb0TJP7bxnYU6nyKCfqCqsI6wzKRxcQQYxW5jlZOp4x3mPees5BF4jHyGHALffYyhPN7DZYdlxomt93iAFSp4XlCxsdb6SmQq4hN0J5t99XedhGzKiR379PQ3S1mhUIcZO5nwQ1LYANTHYkyk6TeS6gANt9w"  # noqa: E501
