"""The students that a row can be refined to: where a refinement may start, and what it may change."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..errors import DodeError
from ..sampling.denoiser import Denoiser, history_corrections, row_corrections
from ..sampling.multistep import as_history
from ..sampling.probe import probe_student
from ..sampling.solvers import Sampler, resolve, sample_ipndm
from ..tables.provenance import IPNDM, PLAIN, PLAIN_SOLVER, REFINED, ROW_GIVEN, Origin
from ..tables.row import LambdaRow
from .levenberg_marquardt import RUNS
from .student import (
    Parameter,
    Student,
    first_changed,
    history_parameters,
    jacobian_cost,
    lambda_parameters,
    sigma_parameters,
)


@dataclass(frozen=True, eq=False)
class Family:
    """The students that a row can be refined to.

    Attributes:
        row: the row given.
        solver: its sampler.
        starts: members to begin with, by name: the row given, its plain solver, perhaps others.
        parameters: what is fitted.
        history: whether the members are weights over the history under Euler in noise space.
    """

    row: LambdaRow
    solver: Sampler
    starts: dict[str, Student]
    parameters: list[Parameter]
    history: bool

    @classmethod
    def of(cls, row: LambdaRow, solver: Sampler, lender: Denoiser | None) -> Family:
        """The widest family that a row is a member of.

        Raises:
            IneligibleSampler: the solver cannot serve.
            DodeError: the row has one evaluation only, or the solver takes other steps than the row.
        """
        options = dict(row.solver_options)
        schedule = torch.tensor(row.sigmas, dtype=torch.float32)  # some samplers serve no other
        if probe_student(solver, schedule, model=lender, options=options).per_step != row.evaluations:
            raise DodeError(f"{row.label}: the solver takes different steps here than when the row was made")
        if row.nfe < 2:
            raise DodeError(f"{row.label}: with one evaluation there is nothing to refine")
        corrections = row_corrections(row)
        given = Student(solver, row.prediction, row.sigmas, corrections, options)
        plain = replace(given, corrections=np.zeros_like(corrections))
        ipndm = replace(plain, solver=sample_ipndm, prediction="noise", options={"max_order": 3})
        members = {
            name: _as_member(student, lender)
            for name, student in ((ROW_GIVEN, given), (PLAIN_SOLVER, plain), (IPNDM, ipndm))
        }
        if members[ROW_GIVEN] is None or members[PLAIN_SOLVER] is None:
            starts: dict[str, Student | None] = {ROW_GIVEN: given, PLAIN_SOLVER: plain}
            fitted = lambda_parameters if row.form == "lambda" else history_parameters
            return cls(row, solver, _distinct(starts), fitted(row.nfe), history=False)
        parameters = history_parameters(row.nfe) + sigma_parameters(row.steps)
        return cls(row, solver, _distinct(members), parameters, history=True)

    @property
    def most_starts(self) -> int:
        """For any weights that the row might have."""
        return 3 if self.history else 2

    def cost(self, fitted: int, held: int, jacobians: int) -> int:
        """Evaluations of one latent at most, for so many latents that are fitted and held out."""
        n = self.row.nfe
        jacobian = jacobian_cost(self.parameters, n) + RUNS * (n - first_changed(self.parameters))
        return self.most_starts * n * (fitted + held) + jacobians * (jacobian * fitted + n * held)

    def row_of(self, name: str, student: Student) -> LambdaRow:
        """A member as a row, with the report and settings of the row given."""
        row = self.row
        if name == ROW_GIVEN:
            return row
        if name == PLAIN_SOLVER:
            plain = np.zeros(row.nfe) if row.form == "lambda" else np.eye(row.nfe)
            return replace(row, weights=plain, origin=Origin(PLAIN))
        origin = Origin(REFINED, row.solver, row.solver_options, row.sigmas)
        weights = student.corrections + np.eye(row.nfe)
        if self.history:
            return replace(
                row, solver="euler", solver_options={}, prediction="noise", form="history", weights=weights,
                sigmas=student.sigmas, origin=origin,
            )  # fmt: skip
        if row.form == "lambda":
            weights = np.diag(student.corrections)
        return replace(row, weights=weights, origin=origin)


def _as_member(student: Student, lender: Denoiser | None) -> Student | None:
    """The student as weights over the history under Euler in noise space; None where it is no such thing."""
    weights = as_history(
        student.solver, student.sigmas, student.corrections, student.prediction, options=student.options, model=lender
    )  # fmt: skip
    if weights is None:
        return None
    return replace(
        student, solver=resolve("euler"), prediction="noise", options={}, corrections=history_corrections(weights)
    )  # fmt: skip


def _distinct(members: dict[str, Student | None]) -> dict[str, Student]:
    """Each student once, under its first name: where all λ are 0, the row given is the plain solver."""
    kept: dict[str, Student] = {}
    for name, student in members.items():
        if student is not None and not any(
            np.allclose(student.corrections, other.corrections, rtol=0, atol=1e-9) for other in kept.values()
        ):
            kept[name] = student
    return kept
