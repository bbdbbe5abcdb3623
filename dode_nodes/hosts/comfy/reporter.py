"""A fit's progress, as ComfyUI shows it."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from tqdm.auto import tqdm

from ...fit.progress import Progress, so_far
from .messages import drop_preview, show_text
from .streams import pictures_of, unpacked

_PREVIEW_SECONDS = 0.5
_READING_SECONDS = 3.0
"""How long a line stays that is to be read before the work goes on."""


class ProgressReporter:
    """Passes progress to ComfyUI: what it will cost, bars, previews, the time left; and the Cancel button back.

    Args:
        like: a latent of the shape that is evaluated.
    """

    def __init__(self, model: ModelPatcher, like: Any, node_id: str | None) -> None:
        self._node_id = node_id
        self._like = like
        self._bar = comfy.utils.ProgressBar(1)
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._told = 0.0
        self._begun = time.monotonic()
        self._console = tqdm(unit="evaluation", disable=not comfy.utils.PROGRESS_BAR_ENABLED)

    def __enter__(self) -> ProgressReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console.close()
        if error is None:
            drop_preview(self._node_id)

    def _preview(self, denoised: torch.Tensor | None) -> Any:
        """A small picture of the first latent; none where it fails: it is not worth the fit."""
        if self._previewer is None or denoised is None:
            return None
        try:
            pictures = pictures_of(unpacked(denoised, self._like))
            return self._previewer.decode_latent_to_preview_image("JPEG", pictures)
        except Exception as error:
            logging.warning("D-ODE: no previews: %s", error)
            self._previewer = None
        return None

    def begin(self, *lines: str) -> None:
        """Say what is to come, and start the clock."""
        for line in lines:
            logging.info("D-ODE: %s", line)
        show_text(self._node_id, "; ".join(lines))
        self._begun = time.monotonic()

    def say(self, line: str) -> None:
        """Something to read before the work goes on."""
        logging.info("D-ODE: %s", line)
        show_text(self._node_id, line)
        self._told = time.monotonic() + _READING_SECONDS

    def __call__(self, progress: Progress) -> None:
        """After an evaluation."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        done, total = progress.done, progress.total
        self._console.total = total
        self._console.set_description(f"D-ODE {progress.stage}", refresh=False)
        self._console.update(done - self._console.n)
        preview = None
        if done and time.monotonic() - self._told > _PREVIEW_SECONDS:
            self._told = time.monotonic()
            show_text(self._node_id, so_far(progress, self._told - self._begun))
            preview = self._preview(progress.denoised)
        self._bar.update_absolute(done, total, preview)
