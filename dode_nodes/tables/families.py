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
    "sd3": ("SD3", "SD3Transformer2DModel"),
    "stable-audio": ("StableAudio",),
    "auraflow": ("AuraFlow", "AuraFlowTransformer2DModel"),
    "pixart-alpha": ("PixArtAlpha",),
    "pixart-sigma": ("PixArtSigma",),
    "hunyuan-dit": ("HunyuanDiT", "HunyuanDiT1", "HunyuanDiT2DModel"),
    "flux": ("Flux", "FluxInpaint", "FluxSchnell", "FluxTransformer2DModel"),
    "flux2": ("Flux2", "Flux2Transformer2DModel"),
    "chroma": ("Chroma", "ChromaTransformer2DModel"),
    "mochi": ("GenmoMochi", "MochiTransformer3DModel"),
    "ltx-video": ("LTXV", "LTXVideoTransformer3DModel"),
    "hunyuan-video": ("HunyuanVideo", "HunyuanVideoI2V", "HunyuanVideoSkyreelsI2V", "HunyuanVideoTransformer3DModel"),
    "cosmos": ("CosmosT2V", "CosmosI2V"),
    "cosmos-predict2": ("CosmosT2IPredict2", "CosmosI2VPredict2"),
    "lumina2": ("Lumina2", "Lumina2Transformer2DModel"),
    "z-image": ("ZImage", "ZImageTransformer2DModel"),
    "wan": (
        "WAN21_T2V", "WAN21_I2V", "WAN21_FunControl2V", "WAN21_Camera", "WAN21_Vace", "WAN22_T2V", "WAN22_Camera",
        "WanTransformer3DModel",
    ),
    "hidream": ("HiDream", "HiDreamImageTransformer2DModel"),
    "omnigen2": ("Omnigen2",),
    "qwen-image": ("QwenImage", "QwenImageTransformer2DModel"),
    "hunyuan-image": ("HunyuanImage21",),
    "ace-step": ("ACEStep",),
    "demo-digits": ("DigitConfig",),
    "demo-pictures": ("ColourConfig",),
}  # fmt: skip
"""The names of ComfyUI's classes, which Forge has taken over and the first tables carry; and of diffusers'
transformers. Its U-Nets are told apart by their config."""
_FAMILIES = {name: family for family, names in _CLASSES.items() for name in names}


def family_of(name: str) -> str:
    """A family by the name of a host's class for it, or by its own name. A class that is not known is one itself."""
    return _FAMILIES.get(name, name)
