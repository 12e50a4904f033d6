"""Small problems that several tests share: data whose optimal denoiser is known, and densities."""

import jax.numpy as jnp
import numpy as np

from diffusion import exact, reverse


def predicting(data, name: str, variance: str = "beta_tilde") -> reverse.Reverse:
    """The optimal model of `data`, as a denoiser that predicts `name`."""

    def denoiser(x_t, log_snr, condition=None):
        return reverse.convert(data.denoiser(x_t, log_snr), x_t, log_snr, "x_0", name)

    return reverse.Reverse(denoiser, name, variance)


def imperfect(variance: str = "beta_tilde") -> reverse.Reverse:
    """An affine denoiser that is nobody's optimum: what holds for it holds for any model."""

    def denoiser(x_t, log_snr, condition=None):
        return 0.6 * x_t + 0.1 + 0.02 * log_snr[:, None]

    return reverse.Reverse(denoiser, "x_0", variance)


def testbed() -> exact.NormalData:
    """x ~ N(0, diag(4, 1, ¼, 1/100)), the exact testbed of equations.md."""
    return exact.NormalData(
        np.zeros(4, np.float32), np.diag([4.0, 1.0, 0.25, 0.01]).astype(np.float32)
    )


def tabulated(table, index):
    """Noise that was drawn beforehand, for every example of a data set and every t from 0 to T."""
    return lambda t: jnp.asarray(table)[index, t]


def constant(eps):
    """The same noise at every t."""
    return lambda t: jnp.asarray(eps)
