"""One row: the numbers of one few-step solver on one schedule, frozen and validated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..errors import DodeError
from ..sigmas import same_sigma
from . import free_outputs, gate, provenance
from .free_outputs import NONE, FreeOutputs
from .gate import Facts
from .provenance import (
    PLAIN,
    REFINED,
    Credit,
    HeldOutErrors,
    Lora,
    Origin,
    StockSetting,
    TrainedLora,
    Unseen,
)
from .solver_options import checked_options

PREDICTIONS = ("noise", "data")
FORMS = ("lambda", "history")
BANDS = "bands"
FEATURES = frozenset({*FORMS, BANDS, free_outputs.FIRST, free_outputs.START, free_outputs.GAUSSIAN})
"""What this version can sample. A row lists what it requires; a reader that lacks one refuses it by name."""

MAX_BANDS = 4
MAX_EVALUATIONS = 256
"""Of a row, and steps: the triangle of its weights must fit memory whatever a file says."""

_ARRAYS = ("sigmas", "weights")
_REQUIRED = {"requires", "solver", "evaluations", "prediction", "form"}
_MOST_FEATURES = 32
_MOST_LORAS = 32
_SHOWN_DIGITS = 8


class Match(NamedTuple):
    """Which row serves a schedule, from which of its steps, and why; ``row`` is None where none does."""

    row: LambdaRow | None
    step: int
    why: str


@dataclass(frozen=True, eq=False)
class LambdaRow:
    """The weights of one solver on one schedule.

    Attributes:
        solver: the sampler's name; ``<name>`` for a callable, which must then be given to sample.
        sigmas: the schedule, ``[N + 1]``, float64, descending to 0.
        evaluations: per step, ``[N]``, E in all; a step that the solver cannot be started at has none.
        weights: λ, ``[E]``; with ``form="history"`` Eq. 8's lower triangle W over the outputs so far,
            ``[E, E]``. Where they differ between bands of frequency or there are free outputs, ``[P, E, F + E]``:
            for the latent and P − 1 low passes of it, F free outputs before the network's (``denoiser``).
        prediction: what an output is: ``"noise"``, (x − D)/σ, or ``"data"``, D.
        form: ``"lambda"`` or ``"history"``.
        solver_options: the sampler's keyword arguments (max_order, …).
        free: outputs that cost no evaluation of the network; the first of a run may be one.
        origin: where the numbers come from.
        errors: what was measured on latents that nothing was fitted on; None where there were none.
        best_stock: the best stock setting that was found for this model at as many evaluations.
        unseen: how it does on latents that nothing was fitted or chosen on.
        loras: that were on the model.
        trained_lora: that was trained for this row.
        credit: whose it is.
        settings: what it was distilled with (cfg, seed, teacher, latent shape, …).
        report: what was measured, for people.
        unknown: optional fields of a later version; kept, and saved again.
        unknown_arrays: the same, of numbers.
    """

    solver: str
    sigmas: np.ndarray
    evaluations: tuple[int, ...]
    weights: np.ndarray
    prediction: str = "noise"
    form: str = "lambda"
    solver_options: Facts = field(default_factory=dict)
    free: FreeOutputs = NONE
    origin: Origin = field(default_factory=Origin)
    errors: HeldOutErrors | None = None
    best_stock: StockSetting | None = None
    unseen: Unseen | None = None
    loras: tuple[Lora, ...] = ()
    trained_lora: TrainedLora | None = None
    credit: Credit | None = None
    settings: Facts = field(default_factory=dict)
    report: Facts = field(default_factory=dict)
    unknown: Facts = field(default_factory=dict)
    unknown_arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def settle(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if not gate.is_name(self.solver):
            raise DodeError("a row's solver must be a name")
        if self.prediction not in PREDICTIONS:
            raise DodeError(
                f"a row's prediction must be one of {PREDICTIONS}, not {gate.shortened(self.prediction)}"
            )
        if self.form not in FORMS:
            raise DodeError(f"a row's form must be one of {FORMS}, not {gate.shortened(self.form)}")
        settle("sigmas", gate.numbers(self.sigmas, "sigmas"))
        settle("weights", gate.numbers(self.weights, "weights"))
        settle("evaluations", tuple(self.evaluations))
        settle("loras", tuple(self.loras))
        settle("solver_options", checked_options(self.solver, self.solver_options, "solver_options"))
        settle("settings", gate.checked(self.settings, gate.SETTINGS, "settings"))
        settle("report", gate.checked(self.report, gate.REPORT, "report"))
        settle("unknown", gate.json_object(self.unknown, "unknown"))
        settle("unknown_arrays", gate.foreign_arrays(self.unknown_arrays))
        self._check_schedule()
        self._check_weights()
        self._check_provenance()

    def _check_schedule(self) -> None:
        gate.check_schedule(self.sigmas, "a row's sigmas")
        if self.steps > MAX_EVALUATIONS:
            raise DodeError(f"a row has at most {MAX_EVALUATIONS} steps; got {self.steps}")
        counts = self.evaluations
        if len(counts) != self.steps or not all(type(n) is int and n >= 0 for n in counts):
            raise DodeError(f"a row's evaluations must be {self.steps} whole numbers, one per step")
        if not 1 <= sum(counts) <= MAX_EVALUATIONS or counts[0] < 1:
            raise DodeError(
                f"a row must have 1 to {MAX_EVALUATIONS} evaluations, at least one in its first step; got {counts}"
            )

    def _check_weights(self) -> None:
        n, w, columns = sum(self.evaluations), self.weights, self.free.columns
        if self.form == "lambda":
            fits = w.shape == (n,)
        elif w.ndim == 3:
            fits = 1 <= len(w) <= MAX_BANDS and w.shape[1:] == (n, columns + n)
        else:
            fits = w.shape == (n, n) and not columns
        if not fits:
            raise DodeError(
                f"weights of shape {w.shape} do not fit {n} evaluations in the form '{self.form}'"
            )
        gate.check_weights(w, self.form)
        if self.form == "history" and np.triu(w, 1 + columns).any():
            raise DodeError("history weights must be a lower triangle: an output cannot use later ones")
        if self.free.requires and (self.form, self.prediction) != ("history", "noise"):
            raise DodeError("only history weights of noise can use outputs that cost no evaluation")
        if self.nfe < 1:
            raise DodeError("a row must evaluate the network at least once")

    def _check_provenance(self) -> None:
        if self.errors is not None and len(self.errors.dode) != self.steps:
            raise DodeError(
                f"a row of {self.steps} steps must have {self.steps} held-out errors, one for each start"
            )
        if self.errors is not None and len(self.errors.later_stock) not in (0, self.paid_steps - 1):
            raise DodeError(
                f"'later_stock' must be empty or one error for each of {self.paid_steps - 1} later starts"
            )
        began = self.origin.sigmas
        if began is None:
            if self.free.first:
                raise DodeError("a row whose first output is free must say what it was refined from")
            return
        if not same_sigma(began[0], self.sigmas[0]):
            raise DodeError("a refined row must start at the σ of the row before refining")
        if len(began) - 1 != self.paid_steps:
            raise DodeError("a refined row must have as many steps as the row before refining")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LambdaRow):
            return NotImplemented
        return self.to_json() == other.to_json() and same_arrays(self.arrays(), other.arrays())

    __hash__ = None  # type: ignore[assignment]  # arrays inside

    def __reduce__(self) -> tuple[Any, ...]:
        return LambdaRow.from_json, (self.to_json(), self.arrays())

    @property
    def steps(self) -> int:
        """Steps of the schedule, N."""
        return len(self.sigmas) - 1

    @property
    def paid_steps(self) -> int:
        """Those that the network is evaluated for, which is what people wait for and count."""
        return self.steps - self.free.first

    @property
    def nfe(self) -> int:
        """Network evaluations of a whole run: E, or one fewer where the first output is free."""
        return sum(self.evaluations) - self.free.first

    @property
    def whole_weights(self) -> np.ndarray:
        """Of history weights those of the network's outputs over the latent as a whole, ``[E, E]``."""
        w = self.weights
        return w if w.ndim == 2 else w[0, :, self.free.columns :]

    @property
    def bands(self) -> int:
        """Of spatial frequency, that have weights of their own."""
        return len(self.weights) if self.weights.ndim == 3 else 1

    @property
    def requires(self) -> list[str]:
        """The features that a reader must know to sample this row."""
        return [self.form, *([BANDS] if self.bands > 1 else []), *self.free.requires]

    @property
    def is_callable(self) -> bool:
        """Whether the solver is a function of the caller's own, which no file can hold."""
        return self.solver.startswith("<")

    @property
    def is_refined(self) -> bool:
        """Whether its numbers were fitted end to end."""
        return self.origin.kind == REFINED

    @property
    def sha256(self) -> str:
        """Of all that sampling uses, in hexadecimal: another hash, another picture. Notes do not change it."""
        facts = [
            self.requires,
            self.solver,
            dict(self.solver_options),
            list(self.evaluations),
            self.prediction,
            self.form,
        ]
        content = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for array in self.own_arrays.values():
            content.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
        return content.hexdigest()

    @property
    def plain(self) -> LambdaRow:
        """What the row is measured against: the solver that it began with, as a row of zeros."""
        origin = self.origin
        own = origin.sigmas is None
        same = own or (origin.solver == self.solver and not self.free.first)
        evaluations = self.evaluations if same else (1,) * self.paid_steps
        return LambdaRow(
            solver=self.solver if origin.solver is None else origin.solver,
            sigmas=self.sigmas if origin.sigmas is None else origin.sigmas,
            evaluations=evaluations,
            weights=np.zeros(sum(evaluations)),
            prediction=self.prediction,
            solver_options=self.solver_options if own else origin.solver_options,
            origin=Origin(PLAIN),
            errors=self.errors and self.errors.of_plain,
            settings=self.settings,
        )

    @property
    def has_own_sigmas(self) -> bool:
        """Whether refining has moved its σ away from the schedule that was asked for."""
        return self.origin.sigmas is not None and not np.array_equal(self.sigmas, self.origin.sigmas)

    def serves(self, solver: str) -> bool:
        """Whether the row is this solver's, or a refinement that began with it."""
        return solver in (self.solver, self.origin.solver)

    def error_from(self, step: int = 0) -> float:
        """The held-out error of a run that begins at ``step``; infinite where it was not measured."""
        error = None if self.errors is None else self.errors.dode[step]
        return float("inf") if error is None else error

    def first_evaluation(self, step: int) -> int:
        """The number of the evaluation that a run from ``step`` begins with."""
        return sum(self.evaluations[:step])

    def find(self, sigmas: Tensor | Sequence[float]) -> Match:
        """Where in this row's schedule ``sigmas`` lies, as a whole or a part of it.

        img2img, hires fix and SplitSigmas pass parts of a schedule: they are found by σ.
        """
        asked = [float(s) for s in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
        if len(asked) < 2:
            return Match(None, 0, "these σ make no step")
        step = next((i for i, s in enumerate(self.sigmas[:-1]) if same_sigma(s, asked[0])), None)
        if step is None:
            return Match(None, 0, f"no step of {self.label} starts at σ = {asked[0]:.6g}")
        own = self.sigmas[step : step + len(asked)].tolist()
        pairs = enumerate(zip(asked, own, strict=False))
        missing = next((i for i, (a, b) in pairs if not same_sigma(a, b)), len(own))
        if missing < len(asked):
            why = f"σ = {asked[missing]:.6g} at position {missing} is not in {self.label}'s schedule"
            return Match(None, 0, why)
        if not self.evaluations[step]:
            return Match(None, 0, f"{self.solver} cannot start at step {step} of {self.label}")
        whole = len(own) == len(self.sigmas)
        part = "the whole schedule" if whole else f"steps {step} to {step + len(own) - 2}"
        return Match(self, step, f"{part} of {self.label}")

    @property
    def label(self) -> str:
        """A few words that tell rows of one table apart."""
        form = "" if self.form == "lambda" else ", weights over the history"
        form += f" in {self.bands} bands" if self.bands > 1 else ""
        form += ", first step free" if self.free.first else ""
        refined = f", refined from {self.plain.solver}" if self.is_refined else ""
        steps, evaluations = _counted(self.paid_steps, "step"), _counted(self.nfe, "evaluation")
        return f"{self.solver}, {steps} ({evaluations}, {self.prediction}{form}{refined})"

    def __repr__(self) -> str:
        if self.form == "lambda":
            what = "λ = " + ", ".join(f"{value:.3g}" for value in self.weights)
        else:
            what = f"weights of shape {self.weights.shape}"
        return f"<LambdaRow {self.label}: {what}>"

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays; optional fields only where there is something to say."""
        optional = {
            "errors": self.errors and self.errors.to_json(),
            "best_stock": self.best_stock and self.best_stock.to_json(),
            "unseen": self.unseen and self.unseen.to_json(),
            "loras": [lora.to_json() for lora in self.loras],
            "trained_lora": self.trained_lora and self.trained_lora.to_json(),
            "credit": self.credit and self.credit.to_json(),
        }
        return (
            dict(self.unknown)
            | {
                "requires": self.requires,
                "solver": self.solver,
                "evaluations": list(self.evaluations),
                "prediction": self.prediction,
                "form": self.form,
                "solver_options": dict(self.solver_options),
                "origin": self.origin.to_json(),
                "settings": dict(self.settings),
                "report": dict(self.report),
            }
            | {name: value for name, value in optional.items() if value}
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """All numbers: also those that this version knows nothing about."""
        return dict(self.unknown_arrays) | self.own_arrays

    @property
    def own_arrays(self) -> dict[str, np.ndarray]:
        """The numbers that sampling uses, float64."""
        return {name: getattr(self, name) for name in _ARRAYS} | self.free.arrays

    @classmethod
    def from_json(cls, facts: Facts, arrays: Mapping[str, np.ndarray]) -> LambdaRow:
        """The inverse of ``to_json`` and ``arrays``.

        Raises:
            DodeError: a field is missing or invalid, or the row requires an unknown feature.
        """
        facts = dict(facts)
        if missing := (_REQUIRED - facts.keys()) | (set(_ARRAYS) - arrays.keys()):
            raise DodeError(f"it lacks {', '.join(sorted(missing))}")
        requires = facts.pop("requires")
        check_features(requires)
        free = FreeOutputs.read(requires, arrays)
        own = {*_ARRAYS, *free.arrays}
        if any(arrays[name].dtype != np.float64 for name in own):
            raise DodeError("its numbers must be float64")
        if not isinstance(facts["evaluations"], list):
            raise DodeError("'evaluations' must be a list")
        known = {name: facts.pop(name) for name in ("solver", "evaluations", "prediction", "form")}
        objects = {name: facts.pop(name, {}) for name in ("solver_options", "settings", "report")}
        optional = ("errors", "best_stock", "unseen", "loras", "trained_lora", "credit")
        errors, stock, unseen, loras, trained, credit = (facts.pop(name, None) for name in optional)
        if loras is not None and (not isinstance(loras, list) or len(loras) > _MOST_LORAS):
            raise DodeError(f"'loras' must be a list of at most {_MOST_LORAS}")
        return cls(
            **known,
            **objects,
            sigmas=arrays["sigmas"],
            weights=arrays["weights"],
            free=free,
            origin=provenance.read(Origin, facts.pop("origin", {}), "'origin'"),
            errors=None if errors is None else provenance.read(HeldOutErrors, errors, "'errors'"),
            best_stock=None if stock is None else provenance.read(StockSetting, stock, "'best_stock'"),
            unseen=None if unseen is None else provenance.read(Unseen, unseen, "'unseen'"),
            loras=tuple(provenance.read(Lora, lora, "'loras'") for lora in loras or []),
            trained_lora=None if trained is None else provenance.read(TrainedLora, trained, "'trained_lora'"),
            credit=None if credit is None else provenance.read(Credit, credit, "'credit'"),
            unknown=facts,
            unknown_arrays={name: array for name, array in arrays.items() if name not in own},
        )


def check_features(requires: Any) -> None:
    """Refuse, by name, what this version cannot sample.

    Raises:
        DodeError: there is such a thing, or this is no list of names.
    """
    if (
        not isinstance(requires, list)
        or len(requires) > _MOST_FEATURES
        or not all(map(gate.is_name, requires))
    ):
        raise DodeError("'requires' must be a list of names")
    if unknown := sorted(set(requires) - FEATURES):
        raise DodeError(
            f"it requires {', '.join(map(repr, unknown))}, which this version does not know: update"
        )


def same_arrays(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Whether two sets of arrays are the same to the bit, NaN and all."""
    return a.keys() == b.keys() and all(
        (array.dtype, array.shape, array.tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes())
        for name, array in a.items()
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def shown_hash(sha256: str) -> str:
    """The digits of a hash that people are shown."""
    return sha256[:_SHOWN_DIGITS]
