"""λ tables: what a distillation found for one model, as frozen, validated data and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from . import safefile
from .denoiser import MAX_EVALUATIONS, PREDICTIONS, dode_corrections, history_corrections
from .errors import DodeError, TableError
from .reading import GIVEN, at, is_number, refinement_of
from .sigmas import same_sigma

FORMAT = "dode-lambda-table"
VERSION = 1
FEATURES = frozenset({"lambda", "history", "per-channel", "told-sigmas"})
"""What this version can sample. A row lists what it needs; a reader that lacks one refuses by name."""


def _numbers(value: Any, name: str) -> np.ndarray:
    """A detached, read-only copy in float64."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DodeError(f"{name} must be numbers: {error}") from error
    if not np.isfinite(array).all():
        raise DodeError(f"{name} has NaN or infinite entries")
    array.flags.writeable = False
    return array


def _arrays(values: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Detached, read-only copies of arrays that this version knows nothing about, as they are."""
    copies = {name: np.array(value) for name, value in values.items()}
    for name, copy in copies.items():
        if copy.dtype.kind not in "fiub":
            raise DodeError(f"the array '{name}' must hold numbers, not {copy.dtype}")
        copy.flags.writeable = False
    return MappingProxyType(copies)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()  # NaN and all


def json_object(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A detached, read-only copy of what JSON can hold.

    Raises:
        DodeError: it cannot.
    """
    try:
        copy = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise DodeError(f"{name} cannot be stored as JSON: {error}") from error
    return MappingProxyType(copy)


@dataclass(frozen=True, eq=False)
class LambdaRow:
    """The weights of one solver on one schedule.

    Attributes:
        solver: the sampler's name; ``<name>`` for a callable, which must then be given to sample.
        sigmas: the schedule, ``[N + 1]``, float64, descending to 0.
        evaluations: network evaluations per step, ``[N]``, E in all; a step that the solver cannot
            be started at has none.
        weights: λ, ``[E]``, or per channel ``[E, C]``; with ``form="history"`` Eq. 8's lower triangle
            W over the outputs so far, ``[E, E]`` or ``[E, E, C]``.
        prediction: what an output is: ``"noise"``, (x − D)/σ, or ``"data"``, D.
        form: ``"lambda"`` or ``"history"``.
        solver_options: the sampler's keyword arguments (max_order, …).
        told_sigmas: the σ′ to tell the network at each evaluation, ``[E]``; None for the σ asked.
        settings: what it was distilled with (cfg, prompts, latent shape, dtype, teacher, seed, …).
        report: what was measured, on latents that λ was not fitted on.
        unknown: optional fields of another version; kept, and saved again.
        unknown_arrays: the same, of numbers.
    """

    solver: str
    sigmas: np.ndarray
    evaluations: tuple[int, ...]
    weights: np.ndarray
    prediction: str = "noise"
    form: str = "lambda"
    solver_options: Mapping[str, Any] = field(default_factory=dict)
    told_sigmas: np.ndarray | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)
    unknown_arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def settle(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if not isinstance(self.solver, str) or not self.solver:
            raise DodeError("a row's solver must be a name")
        if self.prediction not in PREDICTIONS:
            raise DodeError(f"a row's prediction must be one of {PREDICTIONS}, not {self.prediction!r}")
        if self.form not in ("lambda", "history"):
            raise DodeError(f"a row's form must be 'lambda' or 'history', not {self.form!r}")
        settle("sigmas", _numbers(self.sigmas, "sigmas"))
        settle("weights", _numbers(self.weights, "weights"))
        settle("evaluations", tuple(self.evaluations))
        if self.told_sigmas is not None:
            settle("told_sigmas", _numbers(self.told_sigmas, "told_sigmas"))
        for name in ("solver_options", "settings", "report", "unknown"):
            settle(name, json_object(getattr(self, name), name))
        settle("unknown_arrays", _arrays(self.unknown_arrays))
        self._check_schedule()
        self._check_weights()

    def _check_schedule(self) -> None:
        s = self.sigmas
        if s.ndim != 1 or len(s) < 2 or s[-1] != 0 or (np.diff(s) >= 0).any():
            raise DodeError("a row's sigmas must descend, without repetition, to 0")
        counts = self.evaluations
        if len(counts) != len(s) - 1 or not all(type(n) is int and n >= 0 for n in counts):
            raise DodeError(f"a row's evaluations must be {len(s) - 1} whole numbers, one per step")
        if not 1 <= sum(counts) <= MAX_EVALUATIONS or counts[0] < 1:
            raise DodeError(
                f"a row has 1 to {MAX_EVALUATIONS} evaluations, the first in the first step; got {counts}"
            )

    def _check_weights(self) -> None:
        n, w = self.nfe, self.weights
        axes = (n,) if self.form == "lambda" else (n, n)
        if w.shape[: len(axes)] != axes or w.ndim > len(axes) + 1 or 0 in w.shape:
            raise DodeError(
                f"weights of shape {w.shape} do not fit {n} evaluations in the form '{self.form}'"
            )
        if self.form == "history" and any(w[k, k + 1 :].any() for k in range(n)):
            raise DodeError("history weights must be a lower triangle: an output cannot use later ones")
        told = self.told_sigmas
        if told is not None and (told.shape != (n,) or (told <= 0).any()):
            raise DodeError(f"told_sigmas must be {n} positive numbers, one per evaluation")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LambdaRow):
            return NotImplemented
        mine, others = self.arrays(), other.arrays()
        return (
            self.to_json() == other.to_json()
            and mine.keys() == others.keys()
            and all(_same(array, others[name]) for name, array in mine.items())
        )

    __hash__ = None  # arrays inside

    def __reduce__(self) -> tuple[Any, ...]:
        return LambdaRow.from_json, (self.to_json(), self.arrays())

    @property
    def steps(self) -> int:
        """Steps of the schedule, N."""
        return len(self.sigmas) - 1

    @property
    def nfe(self) -> int:
        """Network evaluations of a whole run, E."""
        return sum(self.evaluations)

    @property
    def channels(self) -> int | None:
        """The number of channels that the weights are for; None where they serve any."""
        per_channel = self.weights.ndim > (1 if self.form == "lambda" else 2)
        return self.weights.shape[-1] if per_channel else None

    @property
    def corrections(self) -> np.ndarray:
        """The weights as ``DodeDenoiser`` takes them."""
        return (dode_corrections if self.form == "lambda" else history_corrections)(self.weights)

    @property
    def requires(self) -> list[str]:
        """The features that a reader must know to sample this row."""
        optional = {"per-channel": self.channels is not None, "told-sigmas": self.told_sigmas is not None}
        return [self.form, *(name for name, used in optional.items() if used)]

    @property
    def is_callable(self) -> bool:
        """Whether the solver is a function of the caller's own, which no file can hold."""
        return self.solver.startswith("<")

    def first_evaluation(self, step: int) -> int:
        """The number of the evaluation that a run from ``step`` begins with."""
        return sum(self.evaluations[:step])

    def find(self, sigmas: Tensor | Sequence[float]) -> Match:
        """Where in this row's schedule ``sigmas`` lies, as a whole or a part of it.

        img2img, hires fix and SplitSigmas pass parts of a schedule: they are found by σ.
        """
        asked = [float(s) for s in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
        if len(asked) < 2:
            return Match(None, None, "there is no step to take")
        step = next((i for i, s in enumerate(self.sigmas[:-1]) if same_sigma(s, asked[0])), None)
        if step is None:
            return Match(None, None, f"no step of {self.label} starts at σ = {asked[0]:.6g}")
        own = self.sigmas[step : step + len(asked)].tolist()
        differing = next(
            (i for i, (a, b) in enumerate(zip(asked, own, strict=False)) if not same_sigma(a, b)), None
        )
        if differing is not None or len(own) < len(asked):
            i = len(own) if differing is None else differing
            return Match(None, None, f"σ = {asked[i]:.6g} at position {i} is not in {self.label}'s schedule")
        if not self.evaluations[step]:
            return Match(None, None, f"{self.solver} cannot be started at step {step} of {self.label}")
        part = (
            "the whole schedule" if len(own) == len(self.sigmas) else f"steps {step} to {step + len(own) - 2}"
        )
        return Match(self, step, f"{part} of {self.label}")

    @property
    def is_refined(self) -> bool:
        """Whether it came out of a refinement, and is not the row that went in."""
        refinement = refinement_of(self.report)
        return refinement is not None and refinement.kept != GIVEN

    @property
    def plain(self) -> LambdaRow:
        """What the row is to be measured against: a solver without λ, as a row of zeros.

        For a refined row the solver, on the schedule, that the refinement began with; where its report does
        not say, or says what cannot be, the row's own.
        """
        own = LambdaRow(
            solver=self.solver,
            sigmas=self.sigmas,
            evaluations=self.evaluations,
            weights=np.zeros(self.nfe),
            prediction=self.prediction,
            solver_options=self.solver_options,
            settings=self.settings,
        )
        refinement = refinement_of(self.report)
        if refinement is None:
            return own
        try:
            began = {name: refinement.began.get(name) for name in ("solver", "solver_options", "sigmas")}
            plain = replace(own, **began)
        except DodeError:
            return own
        return plain if same_sigma(plain.sigmas[0], own.sigmas[0]) else own

    @property
    def has_own_sigmas(self) -> bool:
        """Whether refining has moved its σ away from the schedule that was asked for."""
        return not np.array_equal(self.sigmas, self.plain.sigmas)

    def serves(self, solver: str) -> bool:
        """Whether the row is this solver's, or a refinement that began with it."""
        return solver in (self.solver, self.plain.solver)

    @property
    def label(self) -> str:
        """A few words that tell rows of one table apart."""
        form = "" if self.form == "lambda" else ", weights over the history"
        refined = f", refined from {self.plain.solver}" if self.is_refined else ""
        return f"{self.solver}, {self.steps} steps ({self.nfe} evaluations, {self.prediction}{form}{refined})"

    def __repr__(self) -> str:
        if self.weights.ndim == 1:
            what = "λ = " + ", ".join(f"{value:.3g}" for value in self.weights)
        else:
            what = f"{self.form} weights of shape {self.weights.shape}"
        return f"<LambdaRow {self.label}: {what}>"

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays."""
        return dict(self.unknown) | {
            "requires": self.requires,
            "solver": self.solver,
            "evaluations": list(self.evaluations),
            "prediction": self.prediction,
            "form": self.form,
            "solver_options": dict(self.solver_options),
            "settings": dict(self.settings),
            "report": dict(self.report),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The numbers, float64."""
        arrays = dict(self.unknown_arrays) | {"sigmas": self.sigmas, "weights": self.weights}
        return arrays if self.told_sigmas is None else arrays | {"told_sigmas": self.told_sigmas}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> LambdaRow:
        """The inverse of ``to_json`` and ``arrays``.

        Raises:
            DodeError: a field is missing or invalid, or the row requires an unknown feature.
        """
        facts = dict(facts)
        missing = {"requires", "solver", "evaluations", "prediction", "form"} - facts.keys()
        missing |= {"sigmas", "weights"} - arrays.keys()
        if missing:
            raise DodeError(f"it lacks {', '.join(sorted(missing))}")
        _check_features(facts.pop("requires"))
        known_arrays = {name: arrays.get(name) for name in ("sigmas", "weights", "told_sigmas")}
        if any(array is not None and array.dtype != np.float64 for array in known_arrays.values()):
            raise DodeError("its numbers must be float64")
        if not isinstance(facts["evaluations"], list):
            raise DodeError("'evaluations' must be a list")
        known = {name: facts.pop(name) for name in ("solver", "evaluations", "prediction", "form")}
        objects = {name: facts.pop(name, {}) for name in ("solver_options", "settings", "report")}
        for name, value in objects.items():
            if not isinstance(value, dict):
                raise DodeError(f"'{name}' must be an object")
        unknown_arrays = {name: array for name, array in arrays.items() if name not in known_arrays}
        return cls(**known, **objects, **known_arrays, unknown=facts, unknown_arrays=unknown_arrays)


def _check_features(requires: Any) -> None:
    if not isinstance(requires, list) or not all(isinstance(name, str) for name in requires):
        raise DodeError("'requires' must be a list of names")
    if unknown := sorted(set(requires) - FEATURES):
        raise DodeError(
            f"it requires {', '.join(map(repr, unknown))}, which this version does not know: update"
        )


@dataclass(frozen=True)
class Match:
    """Which row serves a schedule, from which of its steps, and why; ``row`` is None where none does."""

    row: LambdaRow | None
    step: int | None
    why: str


@dataclass(frozen=True, eq=False)
class LambdaTable:
    """One model's rows, and what is known of the model.

    Attributes:
        rows: at least one.
        model: facts about the model (family, prediction type, channels, fingerprint, …).
        unknown: optional fields of another version; kept, and saved again.
        unknown_arrays: the same, of numbers.
    """

    rows: Sequence[LambdaRow]
    model: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)
    unknown_arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = tuple(self.rows) if isinstance(self.rows, Sequence) else ()
        if not rows or not all(isinstance(row, LambdaRow) for row in rows):
            raise DodeError("a λ table needs a list of at least one LambdaRow")
        object.__setattr__(self, "rows", rows)
        for name in ("model", "unknown"):
            object.__setattr__(self, name, json_object(getattr(self, name), name))
        object.__setattr__(self, "unknown_arrays", _arrays(self.unknown_arrays))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LambdaTable):
            return NotImplemented
        mine, others = self.unknown_arrays, other.unknown_arrays
        return (
            (self.rows, self.model, self.unknown) == (other.rows, other.model, other.unknown)
            and mine.keys() == others.keys()
            and all(_same(array, others[name]) for name, array in mine.items())
        )

    __hash__ = None  # arrays inside

    def __reduce__(self) -> tuple[Any, ...]:
        return LambdaTable, (self.rows, dict(self.model), dict(self.unknown), dict(self.unknown_arrays))

    def match(self, sigmas: Tensor | Sequence[float], solver: str | None = None) -> Match:
        """The row for a schedule or a part of one.

        Where several rows fit, one whose whole schedule this is goes before one that has it as a part;
        then the one with the smallest held-out error is taken, among equals the first.

        Args:
            sigmas: what is to be sampled, descending.
            solver: only rows that serve this solver.
        """
        candidates = [row for row in self.rows if solver is None or row.serves(solver)]
        if not candidates:
            return Match(
                None, None, f"this table has no row for the solver '{solver}'. It has: {self.contents()}"
            )
        matches = [row.find(sigmas) for row in candidates]
        fitting = [match for match in matches if match.row is not None]
        if fitting:
            return min(fitting, key=lambda m: (len(m.row.sigmas) != len(sigmas), end_error(m.row)))
        why = matches[0].why if len(matches) == 1 else "no row's schedule contains these σ"
        return Match(None, None, f"{why}. The table has: {self.contents()}")

    def contents(self) -> str:
        """The rows, in words."""
        return "; ".join(row.label for row in self.rows)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the table as ``.safetensors``, whole or not at all.

        Raises:
            TableError: the name does not end so, the file exists (unless ``overwrite``), or it cannot
                be written.
        """
        path = Path(path)
        _check_suffix(path)
        facts = dict(self.unknown) | {"model": dict(self.model), "rows": [row.to_json() for row in self.rows]}
        tensors = dict(self.unknown_arrays) | {
            _tensor_name(i, name): array
            for i, row in enumerate(self.rows)
            for name, array in row.arrays().items()
        }
        metadata = {"format": FORMAT, "version": str(VERSION), "table": json.dumps(facts)}
        safefile.write(path, tensors, metadata, overwrite=overwrite)
        return path

    @staticmethod
    def check_new(path: Path) -> None:
        """That ``save`` can write a new table here: to know before the work. A missing folder is made.

        Raises:
            TableError: as ``save`` would.
        """
        _check_suffix(path)
        safefile.check_new(path)

    @classmethod
    def load(cls, path: str | Path) -> LambdaTable:
        """Read a table. No file can run code, hang, or fill memory.

        Raises:
            TableError: naming the file and what is wrong with it.
        """
        path = Path(path)
        tensors, metadata = safefile.read(path)
        if metadata.get("format") != FORMAT:
            raise TableError(f"{path}: a safetensors file, but not a λ table")
        facts = safefile.parse_json(metadata.get("table", ""), path)
        if not isinstance(facts, dict) or not isinstance(facts.get("rows"), list):
            raise TableError(f"{path}: its metadata has no rows")
        try:
            _check_features(facts.get("requires", []))
            rows = [cls._row(i, row, tensors) for i, row in enumerate(facts.pop("rows"))]
            model = facts.pop("model", {})
            if not isinstance(model, dict):
                raise DodeError("'model' must be an object")
            return cls(rows=rows, model=model, unknown=facts, unknown_arrays=tensors)
        except DodeError as error:
            raise TableError(f"{path}: {error}") from error

    @staticmethod
    def _row(i: int, facts: Any, tensors: dict[str, np.ndarray]) -> LambdaRow:
        """Row ``i``; takes its arrays out of ``tensors``."""
        if not isinstance(facts, dict):
            raise DodeError(f"row {i} is not an object")
        prefix = _tensor_name(i, "")
        own = [name for name in tensors if name.startswith(prefix)]
        try:
            return LambdaRow.from_json(facts, {name.removeprefix(prefix): tensors.pop(name) for name in own})
        except DodeError as error:
            raise DodeError(f"row {i}: {error}") from error


def _check_suffix(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise TableError(f"{path}: a table's file name ends in .safetensors")


def _tensor_name(row: int, name: str) -> str:
    return f"rows.{row}.{name}"


def end_error(row: LambdaRow) -> float:
    """The row's held-out error at the end, against its teacher; infinite where it was not checked."""
    value = at(row.report, "error", "dode_end")
    return float(value) if is_number(value) else float("inf")
