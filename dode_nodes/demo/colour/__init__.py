"""The demo's colour pictures: a model that draws the landscapes that words ask for, and one of emoji, without words."""
