"""What a diffusers scheduler's config says: what the network predicts, at which t it is asked, and plain Euler's σ."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from ...errors import DodeError

_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
"""By diffusers' names, as tables call them."""


class AnyScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler that takes the config of any other one, and keeps all of it."""

    _compatibles = [*(each.name for each in KarrasDiffusionSchedulers), "FlowMatchEulerDiscreteScheduler"]  # noqa: RUF012
    order = 1

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As any scheduler; but what another class has by default is kept, too: our defaults are not its."""
        if isinstance(config, Mapping):
            config = {name: value for name, value in config.items() if name != "_use_default_values"}
        return super().from_config(config, return_unused_kwargs, **kwargs)


def without_table(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it was before a λ table was put into it."""
    return {name: value for name, value in config.items() if name not in ("table", "strict")}


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config is settings: its notes on itself may be in another order in another process."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether noise and pictures are interpolated. A config need not say what class it is of."""
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return True
    return "shift" in config and "beta_schedule" not in config


class HostSchedule:
    """A scheduler's config, put to use.

    Args:
        config: of any of diffusers' schedulers that Euler could take the place of.

    Raises:
        DodeError: the network predicts something else, or takes other inputs.

    Attributes:
        flow: whether noise and pictures are interpolated.
        prediction: what the network predicts, as tables call it: ``"eps"``, ``"v"``, ``"x0"`` or ``"flow"``.
        plain: diffusers' own Euler scheduler for it.
        trained_sigmas: that the network was trained on, ascending; without a shift that depends on the size.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        kind = config.get("prediction_type", "epsilon")
        self.flow = is_flow(config)
        self.prediction = "flow" if self.flow else _PREDICTIONS.get(kind, "")
        if not self.prediction or config.get("sigma_data") is not None:
            what = kind if not self.prediction else "EDM"
            raise DodeError(f"λ works with networks that predict noise, v, pictures or flow, not with {what}")
        shift = {"shift": config["flow_shift"]} if "flow_shift" in config else {}
        of = FlowMatchEulerDiscreteScheduler if self.flow else EulerDiscreteScheduler
        known = inspect.signature(of.__init__).parameters.keys() - {"self"}
        self.plain = of(**{key: value for key, value in {**config, **shift}.items() if key in known})
        self.trained_sigmas = self.plain.sigmas[self.plain.sigmas > 0].sort().values

    @property
    def inverted(self) -> bool:
        """Whether t ascends from 0 to 1, as Mochi has it."""
        return bool(self.plain.config.get("invert_sigmas"))

    def shift(self, mu: float | None) -> float:
        """A flow model's shift; ``mu`` where that depends on the size."""
        config = self.plain.config
        if mu is None or not config.use_dynamic_shifting:
            return float(config.shift)
        return math.exp(mu) if config.time_shift_type == "exponential" else mu

    def euler(self, steps: int, **given: Any) -> tuple[Tensor, Tensor]:
        """σ ``[N + 1]`` and t ``[N]`` of plain Euler, on the CPU.

        Args:
            steps: N.
            given: sigmas, timesteps and mu, as a pipeline gives them; None for what it does not.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if not self.flow:
            given.pop("mu", None)
        if self.flow or not given:
            given["num_inference_steps"] = steps
        self.plain.set_timesteps(**given)
        return self.plain.sigmas.cpu(), self.plain.timesteps.cpu()

    def timesteps(self, sigmas: Sequence[float]) -> Tensor:
        """At which t the network is asked, ``[E]`` for E σ, float32 on the CPU."""
        config = self.plain.config
        if self.flow:
            return torch.tensor(sigmas, dtype=torch.float32) * config.num_train_timesteps
        logs = np.log(sigmas)
        if (
            config.timestep_type == "continuous" and self.prediction == "v"
        ):  # as Stable Video Diffusion has it
            return torch.tensor(logs / 4, dtype=torch.float32)
        known = self.trained_sigmas.double().log().numpy()
        return torch.tensor(np.interp(logs, known, np.arange(len(known))), dtype=torch.float32)

    def model_input(self, x: Tensor, sigma: float) -> Tensor:
        """The state at the scale that the network takes it."""
        return x if self.flow else x / math.hypot(1, sigma)

    def noise(self, x: Tensor, sigma: float, output: Tensor) -> Tensor:
        """A network's output about ``x`` as (x − D)/σ: the noise, or the velocity."""
        if self.prediction in ("eps", "flow"):
            return output
        if self.prediction == "v":
            output = x / (sigma**2 + 1) - output * (sigma / math.hypot(1, sigma))
        return (x - output) / sigma

    def noisy(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """A state at σ, which broadcasts over the latents."""
        return (1 - sigma) * clean + sigma * noise if self.flow else clean + sigma * noise

    def init_noise_sigma(self, sigma: float) -> float:
        """What a pipeline multiplies its noise by to begin at σ. Those of flow models do not ask."""
        if self.flow:
            return 1.0
        full = self.plain.config.timestep_spacing in ("linspace", "trailing")
        return sigma if full else math.hypot(1, sigma)


def is_pipelines_own(sigmas: Sequence[float]) -> bool:
    """Whether these are the σ that a flow pipeline passes if its user gives none: equal steps from 1, not shifted yet."""
    n = len(sigmas)
    ends = (1 / n, 1 / 1000)
    return any(np.allclose(sigmas, np.linspace(1, end, n), atol=1e-3) for end in ends)  # some round t
