"""What Stable Diffusion WebUI and its forks load. Inside ComfyUI it is not used."""

from dode_nodes.hosts.webui import extension

extension.load()
DodeScript = extension.DodeScript
