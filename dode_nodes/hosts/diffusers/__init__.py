"""λ tables in diffusers: a scheduler that samples with them, and pipelines that they are distilled in."""

from diffusers import SchedulerMixin  # a pipeline that is loaded looks for it beside our class

from .distill import Distillation, Request, distill_pipeline
from .model_facts import check_pipeline
from .scheduler import DODEScheduler

__all__ = ["DODEScheduler", "Distillation", "Request", "SchedulerMixin", "check_pipeline", "distill_pipeline"]
