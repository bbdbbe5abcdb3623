"""Families of models by names that no host owns."""

from __future__ import annotations

from collections.abc import Mapping

_CLASSES: Mapping[str, tuple[str, ...]] = {
    "sd15": ("SD15",),
    "sd15-edit": ("SD15_instructpix2pix",),
    "sd2": ("SD20",),
    "sd2-unclip": ("SD21UnclipL", "SD21UnclipH"),
    "sdxl": ("SDXL",),
    "sdxl-edit": ("SDXL_instructpix2pix",),
    "sdxl-refiner": ("SDXLRefiner",),
    "ssd-1b": ("SSD1B",),
    "segmind-vega": ("Segmind_Vega",),
    "koala-700m": ("KOALA_700M",),
    "koala-1b": ("KOALA_1B",),
    "svd": ("SVD_img2vid",),
    "cascade-b": ("Stable_Cascade_B",),
    "cascade-c": ("Stable_Cascade_C",),
    "sd3": ("SD3",),
    "stable-audio": ("StableAudio",),
    "auraflow": ("AuraFlow",),
    "pixart-alpha": ("PixArtAlpha",),
    "pixart-sigma": ("PixArtSigma",),
    "hunyuan-dit": ("HunyuanDiT", "HunyuanDiT1"),
    "flux": ("Flux", "FluxInpaint", "FluxSchnell"),
    "flux2": ("Flux2",),
    "chroma": ("Chroma",),
    "mochi": ("GenmoMochi",),
    "ltx-video": ("LTXV",),
    "hunyuan-video": ("HunyuanVideo", "HunyuanVideoI2V", "HunyuanVideoSkyreelsI2V"),
    "cosmos": ("CosmosT2V", "CosmosI2V"),
    "cosmos-predict2": ("CosmosT2IPredict2", "CosmosI2VPredict2"),
    "lumina2": ("Lumina2",),
    "z-image": ("ZImage",),
    "wan": (
        "WAN21_T2V", "WAN21_I2V", "WAN21_FunControl2V", "WAN21_Camera", "WAN21_Vace", "WAN22_T2V", "WAN22_Camera",
    ),
    "hidream": ("HiDream",),
    "omnigen2": ("Omnigen2",),
    "qwen-image": ("QwenImage",),
    "hunyuan-image": ("HunyuanImage21",),
    "ace-step": ("ACEStep",),
}  # fmt: skip
"""The names of ComfyUI's classes, which Forge has taken over; the first tables carry them."""
_FAMILIES = {name: family for family, names in _CLASSES.items() for name in names}


def family_of(name: str) -> str:
    """A family by the name of a host's class for it, or by its own name. A class that is not known is one itself."""
    return _FAMILIES.get(name, name)
