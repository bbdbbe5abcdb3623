"""A pack of the test server: POST /tests/previews makes it like one that was started with that --preview-method."""

from __future__ import annotations

import latent_preview
from aiohttp import web
from comfy.cli_args import LatentPreviewMethod, args
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}


@PromptServer.instance.routes.post("/tests/previews")
async def set_previews(request: web.Request) -> web.Response:
    """The method as text."""
    args.preview_method = LatentPreviewMethod(await request.text())
    latent_preview.default_preview_method = args.preview_method  # newer ones go back to it before each graph
    return web.Response()
