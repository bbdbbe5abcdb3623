"""Small diffusion models, for demonstrations and tests without a download: two of handwritten digits, and in `colour`
one of landscapes, which is what people are shown. `catalogue` loads any of them by name.

Of the digits, `models` loads them, `vae` turns their latents into images, `frechet` judges samples, `train` trains the
models.
"""
