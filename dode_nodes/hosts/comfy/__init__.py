"""The ComfyUI nodes. This module imports nothing; the others import ComfyUI, except ``launch``, which finds it."""
