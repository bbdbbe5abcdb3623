"""What pictures of the tests are made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

DATA = Path(os.environ["DODE_WEBUI_DATA"])
COMMON = {
    "prompt": "a cat", "negative_prompt": "a dog", "steps": 4, "width": 64, "height": 64, "cfg_scale": 5.0, "seed": 3,
    "sampler_name": "D-ODE", "scheduler": "Automatic", "do_not_save_samples": True, "do_not_save_grid": True,
}  # fmt: skip


def runner(scripts: Any, table: str | None, *others: Any) -> Any:
    """The pack's script, which also keeps the latents as ``p.test_latents``, and its argument; then other scripts."""
    from dode_nodes.hosts.webui.extension import DodeScript

    class Recording(DodeScript):
        def post_sample(self, p: Any, ps: Any, *args: Any) -> None:
            samples = ps.samples if isinstance(ps.samples, torch.Tensor) else torch.stack(list(ps.samples))
            p.test_latents = [*getattr(p, "test_latents", []), samples.float().cpu()]

    both = [Recording(), *others]
    for script, (begin, end) in zip(both, [(0, 1)] + [(1, 1)] * len(others), strict=True):
        script.args_from, script.args_to, script.alwayson = begin, end, True
        script.filename = "dode_webui.py"
    of_host = scripts.ScriptRunner()
    of_host.scripts = of_host.alwayson_scripts = both
    return of_host, [table]


def noise_picture() -> Image.Image:
    """A picture to begin with."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def upper_half() -> Image.Image:
    """A mask: only this half is repainted."""
    return Image.fromarray(np.pad(np.full((32, 64), 255, np.uint8), ((0, 32), (0, 0))))


class SmallNetwork(torch.nn.Module):
    """ε of what is not far from normal, and depends on the prompt and on t."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.kernel = torch.nn.Parameter(
            torch.randn(4, 4, 3, 3, generator=generator) / 6, requires_grad=False
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, **_: Any) -> torch.Tensor:
        share = (t.reshape(-1, 1, 1, 1) / 1000).clamp(0, 1).sqrt()
        bent = torch.tanh(torch.nn.functional.conv2d(x, self.kernel, padding=1) + prompt_of(context))
        return share * x + 0.2 * (1 - share) * bent


def prompt_of(context: torch.Tensor) -> torch.Tensor:
    """What the small network sees of a prompt."""
    return context.float().std(dim=(1, 2)).reshape(-1, 1, 1, 1)
