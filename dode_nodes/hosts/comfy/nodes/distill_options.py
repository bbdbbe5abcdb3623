"""What few need to set for 'Distill λ': how it fits, and what else the table is to be good for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ....errors import DodeError
from ....fit.quality import Quality
from ....fit.teacher import Teacher
from ....tables.row import PREDICTIONS
from ..guiders import Conditioning
from ..host_samplers import student_names, teacher_names
from .inputs import CATEGORY

AUTO = "auto"
"""What the fit chooses."""
BY_QUALITY = -1.0
"""In place of a budget."""
Options = io.Custom("DODE_DISTILL_OPTIONS")


@dataclass(frozen=True)
class Expert:
    """All that 'Distill λ' takes beside its own inputs; the defaults are what it does without these options.

    Attributes:
        cfgs: guidance scales besides the node's own.
        latents_of: empty latents of further sizes.
        positives: further prompts.
        latents: how many noises to fit on; 0 for what the quality says.
        refine_budget: of a row, see ``Recipe``; ``BY_QUALITY`` for what the quality says.
        solver, scheduler: where the fit begins; ``AUTO`` for the usual.
        sigmas: a schedule in place of scheduler and steps.
        teacher: what is followed.
        prediction: what λ corrects; ``AUTO`` for the better.
        micro_batch: latents evaluated at a time; 0 for what fits.
        redo: whether a fit that was made or begun before is made anew.
        teacher_model: what the teacher runs on; None for the model itself.
        teacher_cfg: its guidance.
    """

    cfgs: tuple[float, ...] = ()
    latents_of: tuple[dict[str, Any], ...] = ()
    positives: tuple[Conditioning, ...] = ()
    latents: int = 0
    refine_budget: float = BY_QUALITY
    solver: str = AUTO
    scheduler: str = AUTO
    sigmas: torch.Tensor | None = None
    teacher: Teacher = field(default_factory=Teacher)
    prediction: str = AUTO
    micro_batch: int = 0
    redo: bool = False
    teacher_model: ModelPatcher | None = None
    teacher_cfg: float = 7.0

    @property
    def predictions(self) -> tuple[str, ...]:
        """Those to try."""
        return PREDICTIONS if self.prediction == AUTO else (self.prediction,)

    def budget(self, quality: Quality) -> float:
        """The refinement's, of each row."""
        return quality.refine_budget if self.refine_budget == BY_QUALITY else self.refine_budget

    def count(self, quality: Quality, shares: int) -> int:
        """How many noises."""
        return self.latents or quality.count(shares)


USUAL = Expert()


def parse_cfgs(text: str) -> tuple[float, ...]:
    """ "4, 7" as numbers, without repetition; nothing for an empty text.

    Raises:
        DodeError: it holds something else.
    """
    parts = [part for part in re.split(r"[,;\s]+", text.strip()) if part]
    if not all(re.fullmatch(r"\d{1,3}(\.\d+)?", part) for part in parts):
        raise DodeError(f"cfgs must be one number or several, such as '4, 7', not '{text}'")
    return tuple(dict.fromkeys(map(float, parts)))


class DistillOptions(io.ComfyNode):
    """For 'Distill λ'."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="DODE_DistillOptions",
            display_name="Distill λ options",
            category=CATEGORY,
            description="For the options input of Distill λ: more prompts, cfgs and sizes for the table to be good "
            "for, and how the fit works. You need none of it for a first table.",
            inputs=[*_range_inputs(), *_fit_inputs(), *_sockets()],
            outputs=[
                Options.Output(
                    "options", display_name="options", tooltip="For the options input of Distill λ."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        cfgs: str,
        latents: int,
        refine_budget: float,
        solver: str,
        scheduler: str,
        teacher: str,
        scale: int,
        prediction: str,
        micro_batch: int,
        redo: bool = False,
        teacher_cfg: float = 7.0,
        teacher_model: ModelPatcher | None = None,
        positive_2: Conditioning | None = None,
        positive_3: Conditioning | None = None,
        positive_4: Conditioning | None = None,
        latent_2: dict[str, Any] | None = None,
        latent_3: dict[str, Any] | None = None,
        sigmas: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        """Check and pass on."""
        return io.NodeOutput(
            Expert(
                cfgs=parse_cfgs(cfgs),
                latents_of=tuple(each for each in (latent_2, latent_3) if each is not None),
                positives=tuple(each for each in (positive_2, positive_3, positive_4) if each is not None),
                latents=latents,
                refine_budget=BY_QUALITY if refine_budget < 0 else refine_budget,
                solver=solver,
                scheduler=scheduler,
                sigmas=None if sigmas is None else sigmas.cpu(),
                teacher=Teacher(teacher, scale),
                prediction=prediction,
                micro_batch=micro_batch,
                redo=redo,
                teacher_model=teacher_model,
                teacher_cfg=teacher_cfg,
            )
        )


def _range_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "cfgs",
            default="",
            tooltip="Further guidance scales, such as '4, 7'. The table then works over a range, and a little less well "
            "at any one place. The noises are shared out among all of them, so raise latents.",
        ),
    ]


def _fit_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "latents",
            default=0,
            min=0,
            max=1024,
            tooltip="How many noises to distil on. A quarter of them is held out to check λ. More take longer, and the "
            "table fits new noises better. 0: as the quality says (8, 16 or 48).",
        ),
        io.Float.Input(
            "refine_budget",
            default=BY_QUALITY,
            min=BY_QUALITY,
            max=1000.0,
            step=0.5,
            tooltip="Refining fits the whole few-step solver, weights and σ, to the teacher's last state. The budget is "
            "what a row may cost, as a multiple of ten of its own runs over all noises: 4.5 for quality good. 0: λ "
            "alone. -1: as the quality says.",
        ),
        io.Combo.Input(
            "solver",
            options=[AUTO, *student_names()],
            default=AUTO,
            tooltip="The few-step sampler that the fit begins with. auto: euler. Only samplers that can be distilled "
            "are listed.",
        ),
        io.Combo.Input(
            "scheduler",
            options=[AUTO, *comfy.samplers.SCHEDULER_NAMES],
            default=AUTO,
            tooltip="The σ schedule that the fit begins with. auto: karras, or simple for a flow model. A refinement "
            "tries others, too.",
        ),
        io.Combo.Input(
            "teacher",
            options=teacher_names(),
            default="dpmpp_2m",
            tooltip="The sampler to follow. It runs with many steps.",
        ),
        io.Int.Input(
            "scale",
            default=0,
            min=0,
            max=100,
            tooltip="Teacher steps per student step (C in the paper, which took 10). 0: 30 steps in all, and at least 5 "
            "per step (8 for flow models), which is exact enough for a sampler of second order.",
        ),
        io.Combo.Input(
            "prediction",
            options=[AUTO, *PREDICTIONS],
            default=AUTO,
            tooltip="What λ corrects: the predicted noise, or the predicted picture (data). auto tries both and keeps "
            "the one with the smaller held-out error.",
        ),
        io.Int.Input(
            "micro_batch",
            default=0,
            min=0,
            max=1024,
            tooltip="How many latents to evaluate at once. λ stays the same. 0 uses as many as fit into memory by "
            "ComfyUI's own estimate. If memory runs out, the node goes on with half as many.",
        ),
        io.Boolean.Input(
            "redo",
            default=False,
            optional=True,
            tooltip="Fit again, even if the same was fitted before. Otherwise Distill λ takes the table that it saved "
            "then, or goes on where it was stopped.",
        ),
        io.Float.Input(
            "teacher_cfg",
            default=7.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            optional=True,
            tooltip="The cfg of teacher_model. Without a teacher_model it has no effect.",
        ),
    ]


def _sockets() -> list[io.Input]:
    teacher = io.Model.Input(
        "teacher_model",
        optional=True,
        tooltip="A model to follow in place of the one you distil for: the checkpoint without its speed LoRA, say, at "
        "teacher_cfg, while the model has the LoRA and cfg 1. It must make nearly the same picture of the same noise.",
    )
    prompts = [
        io.Conditioning.Input(
            f"positive_{i}",
            optional=True,
            tooltip="Another prompt. All prompts get an equal share of the noises, so that the table is not fitted to a "
            "single picture.",
        )
        for i in (2, 3, 4)
    ]
    sizes = [
        io.Latent.Input(
            f"latent_{i}", optional=True, tooltip="An empty latent of a further size that you sample at."
        )
        for i in (2, 3)
    ]
    sigmas = io.Sigmas.Input(
        "sigmas",
        optional=True,
        tooltip="Your own schedule for the student, in place of scheduler and steps. It must end at 0.",
    )
    return [*prompts, *sizes, sigmas, teacher]
