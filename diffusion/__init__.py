"""The mathematics of diffusion models as latent-variable models: pure functions of arrays.

Arrays are NumPy's or JAX's, with the examples on the first axis. A log-SNR, time or timestep is
what NumPy takes, also a list or one number for all examples; whole numbers are converted.

Start with `model.DiffusionModel` and `bound.bound`. Nothing is imported until it is asked for.
"""
