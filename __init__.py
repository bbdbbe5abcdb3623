"""What ComfyUI loads. Nothing is imported, and nothing of ComfyUI's touched, before it asks for the nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> object:
    """The V3 entry point: the pack's nodes."""
    from .dode_nodes.hosts.comfy.extension import DodeExtension

    return DodeExtension()
