"""A λ table as a diffusers scheduler."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from ...errors import DodeError
from ...sampling.denoiser import over_latent
from ...sampling.stepwise import Course, StepwiseRun
from ...sigmas import is_flow
from ...tables.choice import part_for_steps
from ...tables.remarks import steps_remarks
from ...tables.row import LambdaRow
from ...tables.table import LambdaTable
from .host_schedule import AnyScheduler, HostSchedule, is_pipelines_own


class DODEScheduler(AnyScheduler):
    """Samples with the rows of a λ table; without one that fits, it is Euler.

    pipe.scheduler = DODEScheduler.from_table("mine.safetensors", pipe.scheduler.config)

    ``num_inference_steps`` chooses the row. Latents are scaled as by diffusers' Euler schedulers: x0 + σ·noise, for
    flow models (1 − σ)·x0 + σ·noise.

    Args:
        num_train_timesteps: of the network.
        table: a λ table as ``LambdaTable.to_json`` has it; it is saved with the pipeline.
        strict: raise an error where no row has the number of steps, in place of a warning and the nearest.

    All other settings (β, prediction_type, shift, …) are those of the pipeline's own scheduler, and are kept.

    Raises:
        TableError: the table is not valid.
    """

    __module__ = "dode_nodes.hosts.diffusers"  # as saved pipelines name it: permanent

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, table: dict[str, Any] | None = None, strict: bool = False
    ) -> None:
        self._table = None if table is None else LambdaTable.from_json(table)
        self._said: set[str] = set()
        self._fitting: list[LambdaRow] | None = None
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._run: StepwiseRun | None = None

    @classmethod
    def from_table(
        cls, table: str | Path | LambdaTable, config: Mapping[str, Any], *, strict: bool = False
    ) -> DODEScheduler:
        """A scheduler for a pipeline.

        Args:
            table: a λ table, or its file on this computer.
            config: of the scheduler that the pipeline has.
            strict: see the class.

        Raises:
            TableError: the file is not a valid table.
            DodeError: the table is for another kind of network.
        """
        if not isinstance(table, LambdaTable):
            table = LambdaTable.load(table)
        theirs, ours = table.model.get("prediction_type"), HostSchedule(config).prediction
        if theirs not in (None, ours):
            raise DodeError(
                f"this λ table was made for another kind of model: its prediction type is '{theirs}', this pipeline's "
                f"is '{ours}'. Distil a table for this pipeline"
            )
        scheduler: DODEScheduler = cls.from_config(config, table=table.to_json(), strict=strict)
        return scheduler

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the row for a run.

        Args:
            num_inference_steps: steps; or as many as there are ``sigmas`` or ``timesteps``.
            device: where ``timesteps`` are put.
            sigmas, mu, timesteps: of a pipeline or of its user, for Euler. A row brings its own, so a user's are
                refused.

        Raises:
            DodeError: a user's own σ or t; or, if strict, no row of so many steps.
        """
        given = next((each for each in (timesteps, sigmas) if each is not None), [])
        steps = len(given) if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise DodeError(f"num_inference_steps must be at least 1, not {steps}")
        self._host = HostSchedule(self.config)
        row = self._row_for(steps)
        if row is None:
            states, told = self._host.euler(steps, sigmas=sigmas, mu=mu, timesteps=timesteps)
            self._course = Course.euler(states.double().numpy())
            self._asked = self._course.asked
            self.order = 1
        else:
            if len(given) and (sigmas is None or not is_pipelines_own(sigmas)):
                raise DodeError(
                    "leave out sigmas and timesteps: the row of the λ table brings its own. Choose it by "
                    "num_inference_steps"
                )
            self._course = Course.of(row)
            self._asked = self._course.asked
            if self._wastes_first(self._course):
                self._asked = self._course.trace.sigmas
                self._say(
                    f"{row.label}: here its first step is not free. This pipeline evaluates the network before it asks "
                    f"the scheduler, so this takes {row.nfe + 1} evaluations, for the same picture"
                )
            states = torch.tensor([float(row.sigmas[0]), *self._asked[1:], 0.0], dtype=torch.float32)
            told = self._host.timesteps(self._asked)
            self.order = _order(row)
        self.num_inference_steps = steps if row is None else row.paid_steps
        self.sigmas, self.timesteps = states, told.to(device)
        self._begin_index = self._step_index = None
        self._run = None

    def _row_for(self, steps: int) -> LambdaRow | None:
        """The row of so many steps, or of the nearest number; None where no row fits this pipeline."""
        rows = self._rows()
        if not rows:
            return None
        part = part_for_steps(LambdaTable(rows), steps, nearest=not self.config.strict)
        for line in steps_remarks(part, steps, LambdaTable(rows)):
            self._say(line)
        return part.row

    def _rows(self) -> list[LambdaRow]:
        """Those that can be run in this pipeline; if there are none, that is said."""
        if self._fitting is None:
            self._fitting = []
            reasons = ["there is no λ table"]
            for row in self._table.rows if self._table else ():
                if why := self._unfit(row):
                    reasons.append(why)
                else:
                    self._fitting.append(row)
            if not self._fitting:
                self._say(f"this runs plain Euler: {reasons[-1]}")
        return self._fitting

    def _unfit(self, row: LambdaRow) -> str:
        """Why a row cannot be run in this pipeline; nothing where it can."""
        flow = is_flow(row.sigmas)
        if flow != self._host.flow or self._host.inverted:
            return f"the λ table is {'' if flow else 'not '}for a flow model, unlike this pipeline"
        try:
            Course.of(row)
        except DodeError as error:
            return f"{row.label}: {error}"
        return ""

    def _wastes_first(self, course: Course) -> bool:
        """Whether the first step is free, but the network is evaluated before it all the same.

        Pipelines of flow models ask it about their noise as it is: they neither scale that by ``init_noise_sigma`` nor
        call ``scale_model_input``.
        """
        return course.free_first and self._host.flow

    def _say(self, text: str) -> None:
        """A warning, once."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=5)

    @property
    def init_noise_sigma(self) -> float:
        """What the pipeline multiplies its noise by."""
        return self._host.init_noise_sigma(float(self.sigmas[0]))

    @property
    def begin_index(self) -> int | None:
        """The evaluation that a run begins with, if the pipeline has said."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The next evaluation; None before the first."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin a run with a later evaluation, as img2img does.

        Raises:
            DodeError: there is no such evaluation.
        """
        if begin_index >= len(self.timesteps):
            raise DodeError(
                f"set num_inference_steps to {self.num_inference_steps}, which the λ table has: this run would begin "
                f"after evaluation {begin_index}, but there are {len(self.timesteps)}"
            )
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The evaluation at t. Of two, the second: a stage of the step before comes first."""
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        if isinstance(timestep, Tensor):
            timestep = timestep.to(timesteps.device)
        found = (timesteps == timestep).nonzero()
        return int(found[1 if len(found) > 1 else 0])

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The state as the network takes it; after a first step that is free, if the row has one."""
        index = self._index(timestep)
        if self._run is None:
            sample = self._asked_about(sample)
        return self._host.model_input(sample, self._asked[index])

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The state after an evaluation, ``[B, C, *spatial]``, and the denoised that it follows.

        Args:
            model_output: the network's, guided.
            timestep: that it was told.
            sample: the state.
            generator: not used: nothing is random.
            return_dict: whether to return an object, or a tuple.

        Raises:
            DodeError: the row cannot be used with such latents, or cannot begin here.
        """
        index = self._index(timestep)
        sigma = self._asked[index]
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        asked = x
        if self._run is None:
            self._check(sample)
            asked = self._asked_about(x)
            self._run = StepwiseRun(self._begun)
        noise = self._host.noise(asked, sigma, model_output.to(x.dtype))
        if index == 0 and self._wastes_first(self._begun):
            following, denoised = self._run.freely(x), x - sigma * noise
        else:
            following, denoised = self._run.after(x, noise)
        self._step_index = index + 1
        following = following.to(model_output.dtype)
        if not return_dict:
            return following, denoised
        return EulerDiscreteSchedulerOutput(prev_sample=following, pred_original_sample=denoised)

    def _asked_about(self, x: Tensor) -> Tensor:
        """The state that the network is evaluated at first, for a run that begins with ``x``."""
        return x if self._wastes_first(self._begun) else self._begun.asked_about(x)

    def _index(self, timestep: float | Tensor) -> int:
        """The evaluation that is due; the first one begins the run."""
        if self._step_index is None:
            index = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if index is None else index
            self._begun = self._course_from(self._step_index)
        return self._step_index

    def _course_from(self, index: int) -> Course:
        row = self._course.row
        if index == 0:
            return self._course
        if row is None:
            return Course.euler(self.sigmas[index:].double().numpy())
        evaluation = index + len(self._course.trace.sigmas) - len(self._asked)
        starts = {row.first_evaluation(i): i for i in range(row.steps) if row.evaluations[i]}
        if evaluation not in starts:
            raise DodeError(f"{row.label} cannot begin within a step: choose another strength")
        return Course.of(row, starts[evaluation])

    def _check(self, sample: Tensor) -> None:
        """That the row's weights know their way around such latents."""
        row = self._course.row
        if row is None:
            return
        prior = row.free.gaussian
        if self._host.flow and sample.ndim == 3 and (row.bands > 1 or prior is not None):
            what = "weights per band of frequency" if row.bands > 1 else "a Gaussian denoiser"
            raise DodeError(
                f"this row uses {what}, which packed latents cannot have: distil a table in this pipeline, with "
                "distill_pipeline"
            )
        if prior is not None and sample.shape[1] != len(prior.mean):
            raise DodeError(
                f"this row is for latents of {len(prior.mean)} channels; these have {sample.shape[1]}"
            )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """A picture's latents with the noise of t, or of the state that a run has come to."""
        at = self._begin_index if self._step_index is None else self._step_index
        if self._begin_index is None or at is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            indices = [at] * len(timesteps)
        sigmas = self.sigmas[indices].to(original_samples)
        return self._host.noisy(original_samples, noise, over_latent(sigmas, original_samples))

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """``add_noise`` by the name that flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def _order(row: LambdaRow) -> int:
    """Evaluations of a step, where all but the last have as many: pipelines count steps by them."""
    counts = row.evaluations
    return counts[0] if set(counts[:-1]) == {counts[0]} and not row.free.first else 1
