"""ComfyUI. Its modules import ComfyUI, but for ``launch``, which finds it; nothing is imported here."""
