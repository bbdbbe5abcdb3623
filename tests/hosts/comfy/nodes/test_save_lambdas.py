"""Save λ table and Import λ code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dode_nodes import DodeError, LambdaTable, TableError
from dode_nodes.tables.code import to_code
from tests.hosts.comfy.node_calls import empty, names_in, saved_as, zero_table
from tests.tables.rows import row_of

pytestmark = pytest.mark.comfyui


def save(dode, table, **changes):
    settings = {"save_name": "mine", "rows": "", "author": "", "licence": "", "notes": "", "model_name": ""}
    return dode.run(dode.pack.SaveLambdas, table=table, **(settings | changes))


def test_a_table_is_saved_signed_under_a_name_with_its_digits(dode, lambdas_folder, on_the_node):
    table, path, code = save(
        dode,
        LambdaTable([row_of()], {"name": "old"}),
        author=" me ",
        licence="CC0-1.0",
        notes="a\nb",
        model_name="new",
    )
    assert Path(path) == saved_as("mine", lambdas_folder)
    assert table == LambdaTable.load(path)
    assert table.name == Path(path).stem
    assert table.model == {"name": "new"}
    assert table.rows[0].credit.to_json() == {"author": "me", "licence": "CC0-1.0", "notes": "a\nb"}
    assert code == to_code(table)
    assert on_the_node == [f"saved as {Path(path).name}; {code}"]


def test_rows_of_several_tables_are_merged_and_chosen(dode, lambdas_folder):
    one, two, three = (LambdaTable([row_of(weights=np.full(3, float(i)))]) for i in range(3))
    table, _, _ = save(dode, one, table_2=two, table_4=three, rows="3, 2")
    assert [row.weights[0] for row in table.rows] == [2, 1]
    with pytest.raises(DodeError, match="merge only tables of one model"):
        save(dode, LambdaTable(one.rows, {"channels": 4}), table_2=LambdaTable(two.rows, {"channels": 16}))
    assert names_in(lambdas_folder) == ["mine"]


def test_nothing_is_ever_replaced(dode, lambdas_folder):
    for _ in range(2):
        save(dode, LambdaTable([row_of()]))
    save(dode, LambdaTable([row_of()]), author="another")
    assert names_in(lambdas_folder) == ["mine", "mine_00001", "mine_00002"]


def test_a_bad_name_is_refused(dode, lambdas_folder):
    with pytest.raises(TableError, match="give the table another name"):
        save(dode, LambdaTable([row_of()]), save_name="../outside")
    assert not names_in(lambdas_folder)


def test_a_preview_lies_beside_the_file(dode, lambdas_folder):
    picture = torch.rand(2, 1024, 768, 3)
    _, path, _ = save(dode, LambdaTable([row_of()]), preview=picture)
    assert Image.open(Path(path).with_suffix(".png")).size == (384, 512)
    LambdaTable.load(path)


def test_a_code_goes_from_inspect_to_import_and_samples_the_same(make_model, dode, on_the_node):
    model = make_model()
    table = dode.table(model, steps="8")
    _, text, code = dode.run(dode.pack.InspectLambdas, table=table)
    assert on_the_node[-1] == code
    assert f"σ: {', '.join(str(np.float32(s)) for s in table.rows[0].sigmas[:-1])}, 0\n" in text
    (again,) = dode.run(dode.pack.ImportLambdas, code=f" {code[:50]}\n{code[50:]}\n")
    assert again.sha256 == table.sha256
    assert torch.equal(dode.ksampler(model, again, empty()), dode.ksampler(model, table, empty()))


def test_a_table_without_a_code_says_what_to_share(dode, on_the_node):
    many = LambdaTable([row_of(weights=np.arange(3) + i / 7) for i in range(80)])
    *_, code = dode.run(dode.pack.InspectLambdas, table=many)
    assert code.startswith("share the file: these 80 rows")
    assert on_the_node[-1] == code


def test_what_is_no_code_is_refused(dode):
    with pytest.raises(TableError, match="a code begins with DODE1"):
        dode.run(dode.pack.ImportLambdas, code="<img src=x onerror=alert(1)>")


def test_a_zero_table_of_this_model_is_one_line(make_model):
    assert len(to_code(zero_table(make_model(), "euler"))) <= 1900
