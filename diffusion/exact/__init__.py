"""Data distributions whose optimal denoiser and likelihood are known in closed form."""
