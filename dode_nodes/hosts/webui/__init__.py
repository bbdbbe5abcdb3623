"""λ tables in the WebUI family: AUTOMATIC1111's Stable Diffusion WebUI, Forge, Forge Neo, reForge.

The hosts load ``scripts/dode_webui.py``. Nothing here imports numerics before D-ODE is used.
"""
