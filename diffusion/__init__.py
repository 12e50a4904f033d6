"""The mathematics of diffusion models as latent-variable models: pure functions of arrays.

Start with `model.DiffusionModel` and `bound.bound`. Nothing is imported until it is asked for.
"""
