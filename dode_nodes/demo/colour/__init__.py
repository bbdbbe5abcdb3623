"""The demo's colour pictures: two diffusion models of emoji, trained here, one of them drawing what words ask for."""
