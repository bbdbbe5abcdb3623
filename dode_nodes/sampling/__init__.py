"""The equation, the samplers it corrects, and sampling with a row."""
