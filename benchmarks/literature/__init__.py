"""Learned solvers of the literature on our eps model, each by its authors' own code; run by ``learned.py``."""
