"""The students that a row can be refined to: where a refinement may start, and what it may change."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..errors import DodeError
from ..sampling.denoiser import Denoiser, history_corrections, history_weights, row_corrections
from ..sampling.multistep import as_history
from ..sampling.probe import probe_student
from ..sampling.solvers import Sampler, resolve, sample_ipndm
from ..tables.free_outputs import NONE, GaussianPrior
from ..tables.provenance import IPNDM, PLAIN, PLAIN_SOLVER, REFINED, ROW_GIVEN, Origin
from ..tables.row import LambdaRow
from .student import (
    REACH,
    Parameter,
    Student,
    free_parameters,
    history_parameters,
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
        history: whether the members are weights over the history under Euler in noise space.
    """

    row: LambdaRow
    solver: Sampler
    starts: dict[str, Student]
    history: bool

    @classmethod
    def of(cls, row: LambdaRow, solver: Sampler, lender: Denoiser | None) -> Family:
        """The widest family that a row is a member of.

        Raises:
            IneligibleSampler: the solver cannot serve.
            DodeError: the solver takes other steps than the row.
        """
        given = _student_of(row, solver, lender)
        plain = _plain(row, solver)
        ipndm = replace(plain, solver=sample_ipndm, prediction="noise", options={"max_order": 3})
        members = {
            name: _as_member(student, lender)
            for name, student in ((ROW_GIVEN, given), (PLAIN_SOLVER, plain), (IPNDM, ipndm))
        }
        if members[ROW_GIVEN] is None or members[PLAIN_SOLVER] is None:
            return cls(row, solver, _distinct({ROW_GIVEN: given, PLAIN_SOLVER: plain}), history=False)
        return cls(row, solver, _distinct(members), history=True)

    @property
    def most_starts(self) -> int:
        """For any weights that the row might have."""
        return 3 if self.history else 2

    def parameters(self, student: Student) -> list[Parameter]:
        """What is fitted of a member."""
        n = student.queries
        if not self.history:
            return (lambda_parameters if self.row.form == "lambda" else history_parameters)(n)
        columns, levels = student.free.columns, len(student.corrections)
        weights = [p for i in range(levels) for p in history_parameters(n, level=i, columns=columns)]
        free: list[Parameter] = []
        if student.free.start:  # a first step that is free is the start, as far as weights reach
            free += free_parameters(n, 0, first=REACH if student.free.first else 0)
        if student.free.gaussian is not None:
            free += free_parameters(n, columns - 1)
        return weights + free + sigma_parameters(len(student.sigmas) - 1)

    def row_of(self, name: str, student: Student) -> LambdaRow:
        """A member as a row, with the report and settings of the row given; its errors are to be measured."""
        if name == ROW_GIVEN:
            return self.row
        row = replace(self.row, errors=None)
        plain = row.plain
        if name == PLAIN_SOLVER:
            return replace(
                row, solver=plain.solver, solver_options=plain.solver_options, sigmas=plain.sigmas, form="lambda",
                evaluations=plain.evaluations, weights=plain.weights, free=NONE, origin=Origin(PLAIN),
            )  # fmt: skip
        origin = Origin(REFINED, plain.solver, plain.solver_options, plain.sigmas)
        if self.history:
            weights = history_weights(student.corrections)
            simple = weights.shape[0] == 1 and not student.free.columns
            return replace(
                row, solver="euler", solver_options={}, prediction="noise", form="history",
                weights=weights[0] if simple else weights, sigmas=student.sigmas,
                evaluations=(1,) * student.queries, free=student.free, origin=origin,
            )  # fmt: skip
        if row.form == "lambda":
            return replace(row, weights=np.diag(student.corrections), origin=origin)
        return replace(row, weights=history_weights(student.corrections), origin=origin)

    def holds(self, name: str, student: Student) -> bool:
        """Whether a table can hold a member: its weights may be too large, or σ of it meet."""
        try:
            self.row_of(name, student)
        except DodeError:
            return False
        return True


def under_euler(row: LambdaRow, solver: Sampler, lender: Denoiser | None) -> Student:
    """A row's steps as Euler's, with corrections of the denoiser: all that a loop of one's own must know.

    Raises:
        IneligibleSampler: the solver cannot serve.
        DodeError: it takes other steps than the row, or such as Euler cannot take.
    """
    given = _student_of(row, solver, lender)
    student = given if row.solver == "euler" else _as_member(given, lender)
    if student is None:
        raise DodeError(
            f"choose a row of a sampler that evaluates the network once a step, such as euler or dpmpp_2m: {row.label} "
            "cannot be written as such steps"
        )
    return student


def in_bands(student: Student, bands: int) -> Student:
    """The same, with weights for so many bands of spatial frequency."""
    missing = bands - len(student.corrections)
    if missing <= 0:
        return student
    return replace(student, corrections=np.pad(student.corrections, ((0, missing), (0, 0), (0, 0))))


def with_start(student: Student) -> Student:
    """The same, with the state that a run begins with at hand."""
    if student.free.start:
        return student
    corrections = np.insert(student.corrections, 0, 0, axis=2)
    return replace(student, corrections=corrections, free=replace(student.free, start=True))


def with_gaussian(student: Student, prior: GaussianPrior) -> Student:
    """The same, with the output of a Gaussian denoiser at hand; a first step that is free takes it at once."""
    if student.free.gaussian is not None:
        return student
    corrections = np.insert(student.corrections, student.free.columns, 0, axis=2)
    return replace(student, corrections=corrections, free=replace(student.free, gaussian=prior))


def _student_of(row: LambdaRow, solver: Sampler, lender: Denoiser | None) -> Student:
    """A row as it is, its solver probed."""
    options = dict(row.solver_options)
    schedule = torch.tensor(row.sigmas, dtype=torch.float32)  # some samplers serve no other
    if probe_student(solver, schedule, model=lender, options=options).per_step != row.evaluations:
        raise DodeError(f"{row.label}: the solver takes different steps here than when the row was made")
    return Student(solver, row.prediction, row.sigmas, row_corrections(row), options, row.free)


def _plain(row: LambdaRow, solver: Sampler) -> Student:
    """What a row is measured against, as a student."""
    plain = row.plain
    own = plain.solver == row.solver
    if plain.is_callable and not own:  # a function of somebody's own, which is not at hand
        plain = replace(
            row, weights=np.zeros(sum(row.evaluations)), form="lambda", origin=Origin(PLAIN), free=NONE
        )
        own = True
    sampler = solver if own else resolve(plain.solver)
    return Student(
        sampler, plain.prediction, plain.sigmas, row_corrections(plain), dict(plain.solver_options)
    )


def _as_member(student: Student, lender: Denoiser | None) -> Student | None:
    """The student as weights over the history under Euler in noise space; None where it is no such thing."""
    if student.corrections.ndim == 3:
        return student
    weights = as_history(
        student.solver, student.sigmas, student.corrections, student.prediction, options=student.options, model=lender
    )  # fmt: skip
    if weights is None:
        return None
    return replace(
        student, solver=resolve("euler"), prediction="noise", options={},
        corrections=history_corrections(weights[None]),
    )  # fmt: skip


def _distinct(members: dict[str, Student | None]) -> dict[str, Student]:
    """Each student once, under its first name: where all λ are 0, the row given is the plain solver."""
    kept: dict[str, Student] = {}
    for name, student in members.items():
        if student is not None and not any(same_student(student, other) for other in kept.values()):
            kept[name] = student
    return kept


def same_student(a: Student, b: Student) -> bool:
    """Whether two members take the same steps."""
    return (
        (a.free.requires, a.corrections.shape) == (b.free.requires, b.corrections.shape)
        and same_schedule(a.sigmas, b.sigmas)
        and np.allclose(a.corrections, b.corrections, rtol=0, atol=1e-9)
    )


def same_schedule(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two members' σ are the same."""
    return len(a) == len(b) and np.allclose(a, b, rtol=1e-6, atol=0)
