"""Network evaluations inside a diffusers pipeline: a sampler asks, the pipeline's own loop answers.

CFG, LoRA, ControlNet and offloading behave as in any run, because it is one: every run of a sampler is one call of the
pipeline. Both have a loop of their own, so the sampler runs in a second thread; one of the two always waits.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ...errors import DodeError
from ...fit.latents import Group, Sample
from .host_schedule import AnyScheduler, HostSchedule, without_table

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST = 1000
"""Evaluations that one call of a pipeline is made ready for; after so many, another call goes on."""


class _Leave(BaseException):
    """How our scheduler ends a call of a pipeline: what it was made for is done."""


class Question(NamedTuple):
    """A state as the fit has it, ``[B, C, *spatial]``, and its σ."""

    x: Tensor
    sigma: float


class Conversation:
    """A run of a sampler in a thread of its own, and what it asks.

    Args:
        sample: the run; it is handed this as the model's keyword argument.
    """

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._questions: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Tensor | BaseException] = queue.SimpleQueue()
        self._end: Tensor | BaseException | None = None
        self._modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._thread = threading.Thread(target=self._run, name="D-ODE sampler", daemon=True)

    def _run(self) -> None:
        inference, grad = self._modes  # a thread has modes of its own
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                self._end = self._sample({"conversation": self})
        except BaseException as error:
            self._end = error
        self._questions.put(None)

    def ask(self, question: Question) -> Tensor:
        """From the sampler: the denoised."""
        self._questions.put(question)
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def begin(self) -> Question | None:
        """From the pipeline's side: the first question; None where the run ends without one."""
        self._thread.start()
        return self._questions.get()

    def answer(self, answer: Tensor | BaseException) -> Question | None:
        """Answer the last question, for the next; None where the run has ended."""
        self._answers.put(answer)
        return self._questions.get()

    def result(self) -> Tensor:
        """What the run came to; raises what ended it."""
        self._thread.join()
        if isinstance(self._end, Tensor):
            return self._end
        assert self._end is not None  # noqa: S101  # the thread has ended
        raise self._end


class Latent(NamedTuple):
    """What a pipeline's latents are like.

    Attributes:
        shape: of one, as the pipeline has it.
        dtype: that the pipeline computes in.
        device: where it computes.
        mu: of the schedule's shift, where that depends on the size.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    mu: float | None

    def is_packed(self, flow: bool) -> bool:
        """Whether these are tokens: neighbours in memory need not be neighbours in the picture."""
        return flow and len(self.shape) == 2

    def in_fit(self, x: Tensor, flow: bool) -> Tensor:
        """As a fit has them, ``[B, C, *spatial]``; packed ones in a row, ``[B, 1, n]``."""
        return x.reshape(len(x), 1, -1) if self.is_packed(flow) else x


class _InPlace(AnyScheduler):
    """Takes a pipeline's scheduler's place for one call."""

    init_noise_sigma = 1.0  # the latents come as they are to be asked about

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.begin_index: int | None = None
        self.step_index: int | None = None

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> Self:
        """In place of the one that the pipeline has."""
        scheduler: Self = cls.from_config(without_table(pipe.scheduler.config))
        scheduler._host = HostSchedule(scheduler.config)
        return scheduler

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Runs begin at their beginning."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Get ready, whatever the pipeline would have."""
        self.mu = mu
        self.timesteps = torch.zeros(_MOST, device=device)
        self.sigmas = torch.zeros(_MOST + 1)
        self._begin()

    def _begin(self) -> None:
        pass


class _Looking(_InPlace):
    """For one call, until the pipeline's latents are there."""

    latent: Latent | None = None

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Where guidance has doubled the batch, a latent is still the same."""
        if not self._host.flow:  # their pipelines need not call this
            self._look(sample, sample.dtype)
        return sample

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **_: Any) -> NoReturn:
        """At the latest."""
        self._look(sample, model_output.dtype)

    def _look(self, sample: Tensor, dtype: torch.dtype) -> NoReturn:
        self.latent = Latent(tuple(sample.shape[1:]), dtype, sample.device, self.mu)
        raise _Leave


class _Asking(_InPlace):
    """For as long as a sampler has questions for a batch of one size.

    Attributes:
        question: the one that is to be answered; None when the sampler is done.
    """

    def converse(self, conversation: Conversation, question: Question) -> None:
        """Answer these questions."""
        self._conversation = conversation
        self._batch = len(question.x)
        self.question: Question | None = question
        self._evaluation = 0

    def _begin(self) -> None:
        self._tell()

    def _tell(self) -> None:
        """The next t, in place: the pipeline's loop is over views of it."""
        assert self.question is not None  # noqa: S101  # the loop goes on only while there is one
        self.timesteps[self._evaluation] = self._host.timesteps([self.question.sigma])[0]
        self.sigmas[self._evaluation] = self.question.sigma

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """As the network takes it."""
        return self._host.model_input(sample, float(self.sigmas[self._evaluation]))

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **_: Any) -> tuple[Tensor]:
        """Answer the question; the state of the next one."""
        question = self.question
        if question is None or timestep != self.timesteps[self._evaluation]:
            raise DodeError("this pipeline cannot be distilled in: it asks at other t than its scheduler has")
        x = question.x.reshape(sample.shape)
        noise = self._host.noise(x, question.sigma, model_output.to(x.dtype))
        self.question = self._conversation.answer((x - question.sigma * noise).reshape(question.x.shape))
        if self.question is None or len(self.question.x) != self._batch:
            raise _Leave
        self._evaluation += 1
        if self._evaluation < _MOST:
            self._tell()
        return (self.question.x.reshape(sample.shape).to(sample.dtype),)


class DrivenPipeline:
    """A pipeline with a prompt, as a denoiser.

    Args:
        pipe: the user's; it is not changed.
        arguments: of its call, each text and the one row of each tensor for all latents; without latents and steps.
        latent: what its latents are like.
        flow: whether it is a flow model.
    """

    def __init__(
        self, pipe: DiffusionPipeline, arguments: Mapping[str, Any], latent: Latent, *, flow: bool
    ) -> None:
        self._pipe, self._arguments, self._latent, self._flow = pipe, arguments, latent, flow

    def group(self, noise: Tensor, scale: float) -> Group:
        """Latents that begin as this noise, ``[B, *shape]``, times ``scale``."""
        return Group(self, self._latent.in_fit(noise * scale, self._flow), around=self.around)

    def __call__(self, x: Tensor, sigma: Tensor, *, conversation: Conversation) -> Tensor:
        return conversation.ask(Question(x, float(sigma[0])))

    def around(self, sample: Sample, indices: Tensor, sigmas: Tensor) -> Tensor:
        """Run a sampler in the pipeline; see ``fit.latents.Around``."""
        conversation = Conversation(sample)
        question = conversation.begin()
        while question is not None:
            question = self._call(conversation, question)
        return conversation.result()

    def _call(self, conversation: Conversation, question: Question) -> Question | None:
        """One call of the pipeline, for as long as it can answer; the question that is left.

        It has a batch of its own: when memory runs out, or some latents are asked about, another call goes on.
        """
        scheduler = _Asking.of(self._pipe)
        scheduler.converse(conversation, question)
        latents = question.x.reshape(len(question.x), *self._latent.shape).to(self._latent.dtype)
        try:
            call(self._pipe, scheduler, self._arguments, len(latents), latents=latents)
        except _Leave:
            pass
        except BaseException as error:
            left = conversation.answer(error)
            if not isinstance(error, Exception):  # Ctrl-C: the sampler has ended with it
                raise
            return left
        return scheduler.question


def look(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> Latent:
    """What a pipeline's latents are like; a flow model's network is evaluated once for it.

    Raises:
        DodeError: the pipeline does not ask its scheduler.
    """
    scheduler = _Looking.of(pipe)
    generator = torch.Generator().manual_seed(0)
    try:
        call(pipe, scheduler, arguments, 1, generator=generator)
    except _Leave:
        if scheduler.latent is not None:
            return scheduler.latent
    raise DodeError("this pipeline cannot be distilled in: it does not ask its scheduler")


def call(
    pipe: DiffusionPipeline, scheduler: _InPlace, arguments: Mapping[str, Any], batch: int, **own: Any
) -> None:
    """A pipeline's call for so many latents, with another scheduler: by a copy, nothing is left on the user's."""
    running = copy.copy(pipe)
    running.scheduler = scheduler
    running.set_progress_bar_config(disable=True)
    of_all = {name: _repeated(value, batch) for name, value in arguments.items()}
    running(num_inference_steps=_MOST, output_type="latent", return_dict=False, **of_all, **own)


def _repeated(value: Any, batch: int) -> Any:
    """An argument for a batch: prompts and embeddings have a row for each latent."""
    if isinstance(value, Tensor) and len(value) == 1:
        return value.repeat(batch, *[1] * (value.ndim - 1))
    return [value] * batch if isinstance(value, str) else value
