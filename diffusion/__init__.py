"""The mathematics of diffusion models as latent-variable models: pure functions of arrays."""
