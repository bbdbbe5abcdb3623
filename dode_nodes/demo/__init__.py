"""Two small diffusion models of handwritten digits, for demonstrations and tests without a download.

`models` loads them, `vae` turns their latents into images, `frechet` judges samples, `train` trains the models.
"""
