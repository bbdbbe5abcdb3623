"""Rows and tables to test with: small ones, arbitrary ones, and files as another program might write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st
from safetensors.numpy import save_file

from dode_nodes.tables.free_outputs import NONE, FreeOutputs, GaussianPrior
from dode_nodes.tables.provenance import (
    Credit,
    Distances,
    HeldOutErrors,
    Lora,
    Origin,
    StockSetting,
    TrainedLora,
    Unseen,
)
from dode_nodes.tables.row import LambdaRow
from dode_nodes.tables.table import LambdaTable

SIGMAS = (8.0, 4.0, 2.0, 0.0)
BEGAN = {"solver": "ipndm", "solver_options": {"max_order": 2}, "sigmas": [8.0, 5.0, 1.0, 0.0]}
"""What a refinement of a row over SIGMAS may have begun with."""


def row_of(solver="euler", sigmas=SIGMAS, evaluations=None, weights=None, error=None, **facts):
    """A row of λ = 0, 0.1, …; ``error`` is its held-out error, of the whole or one per step."""
    evaluations = (1,) * (len(sigmas) - 1) if evaluations is None else evaluations
    weights = np.arange(sum(evaluations)) / 10 if weights is None else weights
    if error is not None:
        per_step = error if isinstance(error, tuple) else (error, *[None] * (len(sigmas) - 2))
        facts = {"errors": HeldOutErrors(4, per_step)} | facts
    return LambdaRow(solver, np.array(sigmas), evaluations, weights, **facts)


def refined_row(**facts):
    """Weights over the history, refined from what BEGAN says."""
    return row_of(**{"weights": np.tri(3), "form": "history", "origin": Origin("refined", **BEGAN)} | facts)


# --- Arbitrary ones -----------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
numbers = finite | st.integers(-(2**62), 2**62)
maybe = st.none() | numbers
counts = st.integers(0, 2**63)
names = st.text("abcλ σ_.,()0", max_size=8).map(lambda name: "n" + name)
lines = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=20)
weights_ = st.floats(-99, 99) | st.floats(-1e-300, 1e-300)  # ten of them are less than a row can hold
solvers = st.sampled_from(
    [("euler", {}), ("ipndm", {"max_order": 2}), ("lms", {"order": 3}), ("gradient_estimation", {"ge_gamma": -0.5}),
     ("<mine>", {"λ": 999.5, "n": -3}), ("of another pack", {})]
)  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
unknown_objects = st.dictionaries(st.text().map(lambda name: "x-" + name), json_values, max_size=3)
unknown_arrays = st.dictionaries(
    st.text(alphabet="abcλ. ", min_size=1, max_size=5).map(lambda name: "x-" + name),
    np_st.arrays(
        st.sampled_from(["f8", "f4", "f2", "i8", "i4", "u1", "bool"]),
        np_st.array_shapes(min_dims=0, max_side=3),
    ),
    max_size=2,
)


def objects(**fields):
    """Some of these fields, and unknown ones."""
    known = st.fixed_dictionaries({}, optional=fields)
    return st.builds(lambda a, b: a | b, unknown_objects, known)


settings_ = objects(
    cfg=st.floats(0, 100),
    seed=counts,
    scheduler=names,
    schedule=names,
    latent_shape=st.lists(st.integers(1, 999), max_size=4),
    dtype=st.just("float16"),
    latents=counts,
    groups=counts,
    prompts=counts,
    teacher=names | st.just("<mine>"),
    scale=st.integers(1, 99),
    host=names,
)
models = objects(
    name=lines,
    kind=names,
    family=names,
    prediction_type=names,
    channels=st.integers(1, 128),
    shift=maybe,
    sigma_min=maybe,
    sigma_max=maybe,
    fingerprint=st.fixed_dictionaries({"layout": names, "values": st.lists(numbers, max_size=48)})
    | st.fixed_dictionaries(
        {"ascending": counts, "samples": st.lists(st.lists(numbers, min_size=16, max_size=16), max_size=2)}
    ),
    patches=st.fixed_dictionaries({"weights": counts, "strengths": st.lists(numbers, max_size=3)}),
)
stages = st.fixed_dictionaries(
    {"stage": st.sampled_from(["row given", "plain solver", "iPNDM-3", "Jacobian 1"]) | names},
    optional={"fitted_error": maybe, "held_out_error": maybe, "evaluations": counts},
)
reports = objects(
    fitted_latents=counts,
    held_out_latents=counts,
    checked=st.booleans(),
    teacher_error=maybe,
    lambda_standard_error=st.lists(st.none() | st.floats(0, allow_infinity=False), max_size=6),
    undetermined=st.lists(counts, max_size=3),
    shrunk_to=numbers,
    after_steps=objects(stock=st.lists(maybe, max_size=6), dode=st.lists(maybe, max_size=6)),
    refined=objects(
        kept=st.sampled_from(["row given", "plain solver", "iPNDM-3"]) | names,
        interrupted=st.booleans(),
        stages=st.lists(stages, max_size=4),
    ),
    evaluations=st.dictionaries(st.text(), counts, max_size=3),
)
stock_settings = st.builds(
    StockSetting, names, names, st.floats(0, 1e9), st.integers(1, 99), discard_penultimate=st.booleans()
)
distances_ = st.builds(Distances, *[st.floats(0, 1e9)] * 4)
unseen_ = st.builds(Unseen, st.integers(1, 99), distances_, distances_, st.floats(0, 1))
credits_ = st.builds(
    Credit, lines.map(lambda line: "a" + line), lines, lines, st.sampled_from(["", "2026-01-31"])
)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
loras = st.builds(Lora, hashes, numbers, lines)
trained_loras = st.builds(
    TrainedLora, hashes, numbers, st.floats(0, 1e9), st.floats(0, 1e9), st.integers(1, 99), lines
)


def descending(steps):
    """A schedule of so many steps."""
    inner = st.lists(st.floats(2**-10, 2**10, width=32), min_size=steps, max_size=steps, unique=True)
    return inner.map(lambda sigmas: np.array([*sorted(sigmas, reverse=True), 0.0]))


@st.composite
def priors(draw):
    """A Gaussian prior of a few channels."""
    channels, knots = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    roots = draw(np_st.arrays("f8", (knots, channels, channels), elements=st.floats(-100, 100)))
    mean = draw(np_st.arrays("f8", channels, elements=st.floats(-100, 100)))
    return GaussianPrior(mean, roots @ roots.transpose(0, 2, 1))


@st.composite
def rows(draw):
    """Any row there can be, of up to five steps."""
    steps = draw(st.integers(1, 5))
    sigmas = draw(descending(steps))
    evaluations = [
        draw(st.integers(1, 3)),
        *draw(st.lists(st.integers(0, 3), min_size=steps - 1, max_size=steps - 1)),
    ]
    n = sum(evaluations)
    form = draw(st.sampled_from(["lambda", "history", "wide"]))
    prediction = draw(st.sampled_from(["noise", "data"]))
    free = NONE
    if form == "wide":
        first = steps > 1 and n > evaluations[0] and draw(st.booleans())
        free = FreeOutputs(first, draw(st.booleans()), draw(st.none() | priors()))
        form, prediction = "history", "noise"
        shape = (draw(st.integers(1, 4)), n, free.columns + n)
    else:
        shape = (n,) if form == "lambda" else (n, n)
    weights = draw(np_st.arrays("f8", shape, elements=weights_))
    weights /= max(1, np.prod(shape[:-2]) * shape[-1] / 10)
    origin = Origin(draw(st.sampled_from(["distilled", "refined", "plain"])))
    if free.first or draw(st.booleans()):
        began = draw(descending(steps - free.first))
        if free.first:  # it must say what it began with
            sigmas[0] = began[0] = max(sigmas[0], began[0])
        began[0] = sigmas[0] if steps == 1 or sigmas[0] > began[1] else began[0]
        if began[0] == sigmas[0]:
            origin = Origin(origin.kind, *draw(solvers), began)
    measured = st.lists(st.none() | st.floats(0, 1e9), min_size=steps, max_size=steps)
    solver, options = draw(solvers)
    return LambdaRow(
        solver=solver,
        sigmas=sigmas,
        evaluations=tuple(evaluations),
        weights=np.tril(weights, free.columns) if form == "history" else weights,
        prediction=prediction,
        form=form,
        free=free,
        solver_options=options,
        origin=origin,
        errors=draw(
            st.none() | st.builds(HeldOutErrors, st.integers(1, 99), measured, st.none() | st.floats(0, 1e9))
        ),
        best_stock=draw(st.none() | stock_settings),
        unseen=draw(st.none() | unseen_),
        loras=draw(st.lists(loras, max_size=2)),
        trained_lora=draw(st.none() | trained_loras),
        credit=draw(st.none() | credits_),
        settings=draw(settings_),
        report=draw(reports),
        unknown=draw(unknown_objects),
        unknown_arrays=draw(unknown_arrays),
    )


tables = st.builds(
    LambdaTable,
    rows=st.lists(rows(), min_size=1, max_size=3),
    model=models,
    unknown=unknown_objects,
    unknown_arrays=unknown_arrays,
)


# --- Files of another program -------------------------------------------------------------------------


def write(path: Path, facts: Any = None, tensors: dict[str, np.ndarray] | None = None, **metadata: str):
    """A file like a table's: of one row, but for what is given."""
    facts = changed() if facts is None else facts
    tensors = arrays() if tensors is None else tensors
    text = facts if isinstance(facts, str) else json.dumps(facts)
    save_file(tensors, path, {"format": "dode-lambda-table", "version": "2", "table": text} | metadata)
    return path


def changed(**facts: Any) -> dict[str, Any]:
    """The JSON of a table of one row, with these of its fields changed; None leaves one out."""
    row = row_of().to_json() | facts
    return {"rows": [{name: value for name, value in row.items() if value is not None}]}


def arrays(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """The tensors of that table, with these changed; None leaves one out."""
    of_row = row_of().arrays() | changes
    return {f"rows.0.{name}": value for name, value in of_row.items() if value is not None}
