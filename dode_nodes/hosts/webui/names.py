"""What people and programs read."""

SAMPLER = "D-ODE"
"""The sampling method, and the script as the API names it."""
STOCK = "DPM++ 2M"
"""The host's own sampler, which runs where no table does."""
AUTO, NONE = "auto", "none"
INFOTEXT = "D-ODE table"
FALLBACK = "D-ODE fallback"
