"""Flax networks: (x_t, log-SNR, condition) -> prediction."""
