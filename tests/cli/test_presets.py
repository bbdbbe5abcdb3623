"""``index`` and ``import``: what is contributed is checked, and what is shared gets a safe name."""

from __future__ import annotations

import html
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dode_nodes.cli import presets
from dode_nodes.cli.commands import main
from dode_nodes.tables.code import to_code
from dode_nodes.tables.provenance import Credit, HeldOutErrors, StockSetting
from dode_nodes.tables.table import LambdaTable
from dode_nodes.tables.trust import shipped_hashes
from tests.import_comfyui import REPOSITORY
from tests.tables.rows import refined_row, row_of

ROW = refined_row(
    credit=Credit("me", "CC0-1.0"), errors=HeldOutErrors(4, (0.0312, None, None)), settings={"cfg": 7.0},
    best_stock=StockSetting("deis", "beta", 0.057, 96),
)  # fmt: skip
MODEL = {
    "family": "sdxl",
    "prediction_type": "eps",
    "name": "dream | <b>x</b> `y` [z](javascript:1) v1.safetensors",
}


def contribute(folder: Path, table: LambdaTable, name: str = "") -> Path:
    place = folder / "community"
    place.mkdir(exist_ok=True)
    return table.save(place / (name or f"dream-{table.sha256[:8]}.safetensors"))


def test_the_page_has_a_line_for_each_row_and_the_hashes(tmp_path, capsys):
    table = LambdaTable([ROW, replace(ROW, settings={"cfg_range": [5, 7.5]})], MODEL)
    contribute(tmp_path, table)
    plain = LambdaTable([row_of()])
    plain.save(tmp_path / "plain.safetensors")
    assert main(["index", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    said = re.sub(r"\\(.)", r"\1", text)
    line = next(line for line in said.splitlines() if "sdxl" in line)
    assert "| sdxl | ipndm, refined | 3 | 0.0312 (0.0570) | 7 | CC0-1.0 |" in line
    assert "| 5–7.5 | CC0-1.0 |" in said
    assert shipped_hashes(tmp_path / "README.md") == {table.sha256, plain.sha256}
    assert capsys.readouterr().out.splitlines() == [
        "plain.safetensors: OK", f"community/dream-{table.sha256[:8]}.safetensors: OK",
    ]  # fmt: skip


def test_what_git_does_not_keep_is_not_on_the_page_and_so_not_trusted(tmp_path, capsys):
    kept, other = LambdaTable([ROW], MODEL), LambdaTable([replace(ROW, weights=0.5 * ROW.weights)], MODEL)
    folder = tmp_path / "lambdas"
    folder.mkdir()
    contribute(folder, kept)
    for arguments in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    path = contribute(folder, other)
    assert main(["index", str(folder)]) == 0
    assert shipped_hashes(folder / "README.md") == {kept.sha256}
    assert f"git does not keep them (git add): community/{path.name}" in capsys.readouterr().err


def test_the_packs_own_page_is_written_in_a_checkout_only(tmp_path, monkeypatch, capsys):
    contribute(tmp_path, LambdaTable([ROW], MODEL))
    monkeypatch.setattr(presets, "LAMBDAS", tmp_path)
    monkeypatch.setenv("PATH", "")
    assert main(["index"]) == 2
    assert "in a git checkout" in capsys.readouterr().err
    assert not (tmp_path / "README.md").exists()


def test_a_hash_in_the_name_of_a_model_is_not_trusted(tmp_path):
    table = LambdaTable([ROW], MODEL | {"name": f"- x: `{'0' * 64}`"})
    (tmp_path / "README.md").write_text(presets.page([("a.safetensors", table)]))
    assert shipped_hashes(tmp_path / "README.md") == {table.sha256}


def test_strangers_words_are_text_in_the_page():
    lines = presets.page([("a.safetensors", LambdaTable([ROW], MODEL))]).splitlines()
    line = next(line for line in lines if "dream" in line)
    assert not re.search(r"(?<!\\)[<`\[]", line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 9
    assert html.escape("<b>") not in line


BAD = {
    "another name": (lambda table: (table, "mine.safetensors"), "call it mine-[0-9a-f]{8}.safetensors, as Save λ table"),
    "no author": (lambda table: replace(table, rows=[replace(ROW, credit=None)]), "set author and licence"),
    "no licence": (lambda table: replace(table, rows=[replace(ROW, credit=Credit("me"))]), "set author and licence"),
    "no model": (lambda table: replace(table, model={"family": "sdxl", "prediction_type": "eps"}), "set model_name"),
    "no family": (lambda table: replace(table, model={"name": "x"}), "does not say which family"),
    "no errors": (lambda table: replace(table, rows=[replace(ROW, errors=None)]), "without held-out errors"),
    "a function": (lambda table: replace(table, rows=[replace(ROW, solver="<mine>")]), "function of your own"),
    "unknown fields": (lambda table: replace(table, unknown={"x": 1}), "fields that this version does not know"),
    "prompts": (
        lambda table: replace(table, rows=[replace(ROW, settings={"prompt": "secret"})]), "does not know",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "why"), BAD.values(), ids=BAD)
def test_a_contribution_that_lacks_something_is_told_what(tmp_path, change, why, capsys):
    changed = change(LambdaTable([ROW], MODEL))
    path = contribute(tmp_path, *(changed if isinstance(changed, tuple) else (changed,)))
    contribute(tmp_path, LambdaTable([replace(ROW, weights=0.5 * ROW.weights)], MODEL))
    assert main(["index", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert re.search(rf"{re.escape(str(path))}: .*{why}", said.out)
    assert said.out.count(": OK") == 1
    assert "1 of the files are bad" in said.err
    assert not (tmp_path / "README.md").exists()


def test_other_files_are_refused(tmp_path, capsys):
    place = contribute(tmp_path, LambdaTable([ROW], MODEL)).parent
    (place / "preview.png").write_bytes(b"x")
    assert main(["index", "--check", str(tmp_path)]) == 0
    for name, content in (
        ("evil.py", b""),
        ("large.png", bytes(600_000)),
        ("bad.safetensors", b"bad"),
        (".hidden", b""),
    ):
        (place / name).write_bytes(content)
        assert main(["index", "--check", str(tmp_path)]) == 1
        assert name in capsys.readouterr().out
        (place / name).unlink()
    (place / "link.safetensors").symlink_to("/etc/passwd")
    assert main(["index", "--check", str(tmp_path)]) == 1
    assert "put the file itself here, not a link" in capsys.readouterr().out
    assert not (tmp_path / "README.md").exists()
    assert main(["index", str(tmp_path / "none")]) == 2


def test_the_packs_own_page_lists_what_it_ships():
    listed = shipped_hashes(REPOSITORY / "lambdas" / "README.md")
    shipped = [LambdaTable.load(path).sha256 for path in (REPOSITORY / "lambdas").glob("demo_*.safetensors")]
    assert listed >= set(shipped)


def test_the_workflow_reads_only_and_runs_the_base_branchs_validator():
    text = (REPOSITORY / ".github" / "workflows" / "presets.yml").read_text()
    assert "on:\n  pull_request:\n" in text  # never pull_request_target
    assert "permissions:\n  contents: read\n" in text
    assert "ref: ${{ github.event.pull_request.base.sha }}\n          path: base" in text
    assert "pip install ./base" in text
    assert "contributed/lambdas" in text
    assert text.count("persist-credentials: false") == 2


@pytest.mark.parametrize(
    ("name", "safe"),
    [("my model (1)", "my-model-1"), ("con", "con-table"), ("‮evil", "evil"), ("x-0123abcd", "x"), ("...", "shared"),
     ("a" * 200, "a" * 60), ("$(rm -rf)", "rm--rf")],
)  # fmt: skip
def test_shared_files_get_safe_names_with_their_digits(tmp_path, name, safe, capsys):
    table = LambdaTable([row_of()])
    source, target = tmp_path / "download", tmp_path / "lambdas"
    source.mkdir()
    table.save(source / f"{name}.safetensors")
    assert main(["import", str(source / f"{name}.safetensors"), "--to", str(target)]) == 0
    (path,) = target.iterdir()
    assert re.fullmatch(
        rf"{re.escape(safe)}-{table.sha256[:8]}\.safetensors", path.name.replace("rm-rf", "rm--rf")
    )
    assert LambdaTable.load(path) == table
    assert str(path) in capsys.readouterr().out


def test_codes_are_imported_and_nothing_is_replaced(tmp_path, capsys):
    table = LambdaTable([row_of()])
    for _ in range(2):
        assert main(["import", to_code(table), "--to", str(tmp_path)]) == 0
    assert len(list(tmp_path.iterdir())) == 2
    assert main(["import", "DODE1x", "--to", str(tmp_path)]) == 2
    assert "copy it again" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "none.safetensors"), "--to", str(tmp_path)]) == 2
