"""Families: which students a row can be refined to, and that a row made of one samples as it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dode_nodes import DodeError, LambdaRow, Latents
from dode_nodes.fit.family import Family
from dode_nodes.fit.scope import Scope
from dode_nodes.fit.student import InnerSigma, Weight
from dode_nodes.sampling.sample import sample_dode, solver_of
from dode_nodes.sampling.solvers import SOLVERS, sample_ipndm
from tests.oracles import two_peaks
from tests.toys import karras, latents

SIGMAS = karras(4).numpy()
ONCE, TWICE = (1, 1, 1, 1), (2, 2, 2, 1)


def row_of(solver, evaluations=ONCE, scale=0.2, form="lambda", **fields):
    """With random weights; with ``scale=0`` the plain solver."""
    n = sum(evaluations)
    noise = scale * np.random.default_rng(1).normal(size=(n, n))
    weights = noise[0] if form == "lambda" else np.eye(n) + np.tril(noise)
    return LambdaRow(solver, SIGMAS, evaluations, weights, form=form, **fields)


def family_of(row):
    return Family.of(row, solver_of(row, None), lender=None)


def sampled(row, x):
    return sample_dode(two_peaks, x, row.sigmas, disable=True, row=row)


ROWS = {
    "euler": row_of("euler"),
    "euler, data": row_of("euler", prediction="data"),
    "dpmpp_2m": row_of("dpmpp_2m"),
    "ipndm of order 2": row_of("ipndm", solver_options={"max_order": 2}),
    "deis, data": row_of("deis", prediction="data"),
    "history": row_of("euler", form="history"),
    "heun": row_of("heun", TWICE),
    "dpm_2, data": row_of("dpm_2", TWICE, prediction="data"),
    "heun with history": row_of("heun", TWICE, form="history"),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_start_is_what_its_name_says_and_so_is_the_row_that_is_made_of_it(name):
    row, x = ROWS[name], latents(3)
    family = family_of(row)
    (batch,) = Latents.of(two_peaks, x).batches()
    options = dict(row.solver_options)
    expected = {
        "row given": sampled(row, x),
        "plain solver": SOLVERS[row.solver](two_peaks, x, torch.tensor(SIGMAS), disable=True, **options),
        "iPNDM-3": sample_ipndm(two_peaks, x, torch.tensor(SIGMAS), disable=True, max_order=3),
    }
    assert list(family.starts) == list(expected)[: family.most_starts]
    for start, student in family.starts.items():
        end, _ = student.run(two_peaks, batch)
        torch.testing.assert_close(end, expected[start], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sampled(family.row_of(start, student), x), end, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ROWS)
def test_a_member_and_its_row_are_one(name):
    """However its numbers are moved."""
    row, x = ROWS[name], latents(3)
    family = family_of(row)
    student = family.starts["row given"]
    for parameter in family.parameters(student):
        student = parameter.move(student, 0.03)
    refined = family.row_of("Jacobian 1", student)
    (batch,) = Latents.of(two_peaks, x).batches()
    torch.testing.assert_close(sampled(refined, x), student.run(two_peaks, batch)[0], rtol=1e-9, atol=1e-9)
    assert (refined.origin.kind, refined.origin.solver) == ("refined", row.solver)
    assert refined.origin.solver_options == row.solver_options
    assert np.array_equal(refined.origin.sigmas, row.sigmas)
    assert refined.nfe == row.nfe
    assert refined.has_own_sigmas == family.history
    assert torch.equal(sampled(refined.plain, x), sampled(family.row_of("plain solver", student), x))


@pytest.mark.parametrize("name", ROWS)
def test_multistep_solvers_get_weights_and_sigmas_others_the_numbers_they_have(name):
    row = ROWS[name]
    family = family_of(row)
    parameters = family.parameters(family.starts["row given"])
    sigmas = [p.k for p in parameters if isinstance(p, InnerSigma)]
    weights = [p for p in parameters if isinstance(p, Weight)]
    assert family.history == (row.evaluations == ONCE)
    assert sigmas == ([1, 2, 3] if family.history else [])
    if family.history:
        assert len(weights) == 1 + 2 + 3 + 4
    else:
        assert len(weights) == (6 if row.form == "lambda" else 1 + 2 + 3 + 4 * 4)


@pytest.mark.parametrize(("solver", "evaluations", "starts"), [
    ("euler", ONCE, ["row given", "iPNDM-3"]),
    ("dpmpp_2m", ONCE, ["row given", "iPNDM-3"]),
    ("heun", TWICE, ["row given"]),
])  # fmt: skip
@pytest.mark.parametrize("form", ["lambda", "history"])
def test_equal_starts_are_one_but_paid_for_as_two(solver, evaluations, starts, form):
    """Whether they are equal depends on the weights, which are not known when the cost is."""
    plain = family_of(row_of(solver, evaluations, scale=0, form=form))
    other = family_of(row_of(solver, evaluations, form=form))
    assert list(plain.starts) == starts
    assert len(other.starts) == len(starts) + 1 == plain.most_starts
    costs = {Scope(family, [], 8, 2, 0).plan(None).fitting for family in (plain, other)}
    assert len(costs) == 1


def test_ipndm_is_no_start_beside_itself():
    family = family_of(row_of("ipndm", solver_options={"max_order": 3}))
    assert list(family.starts) == ["row given", "plain solver"]


def test_what_has_no_family_is_refused():
    with pytest.raises(DodeError, match="takes different steps here than when the row was made"):
        family_of(row_of("euler", (2, 1, 1, 1)))
