"""Small problems that several tests share: data whose optimal denoiser is known, and densities."""

import jax.numpy as jnp
import numpy as np

from diffusion import reverse, schedules
from diffusion.exact import distributions
from diffusion.model import DiffusionModel

_RNG = np.random.default_rng(0)
_FACTOR = _RNG.normal(size=(3, 3))
NORMAL = distributions.normal(np.array([0.5, -1.0, 2.0]), _FACTOR @ _FACTOR.T + 0.1 * np.eye(3))
LEVELS = schedules.linear_log_snr(1.0, -1.0).levels(2)
DISCRETE = distributions.points(_RNG.integers(-4, 5, (6, 3)) / 4)


def mixture(num_components: int, num_dims: int) -> distributions.Mixture:
    """Components a few standard deviations apart, each stretched its own way, of std 0.4 and up."""
    rng = np.random.default_rng(num_dims)
    factors = 0.3 * rng.normal(size=(num_components, num_dims, num_dims))
    return distributions.Mixture(
        rng.dirichlet(np.full(num_components, 5.0)),
        rng.uniform(-1.5, 1.5, (num_components, num_dims)),
        factors @ factors.swapaxes(1, 2) + 0.16 * np.eye(num_dims),
    )


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


def without_decoder(p: reverse.Reverse, levels: schedules.Levels = LEVELS) -> DiffusionModel:
    """A model for functions that do not use its decoder, nor, by default, its levels."""

    def decoder(*_):
        raise AssertionError("the decoder must not be used")

    return DiffusionModel(p, decoder, levels)


def testbed() -> distributions.Mixture:
    """x ~ N(0, diag(4, 1, ¼, 1/100)), the Gaussian testbed of docs/lecture.md."""
    return distributions.normal(
        np.zeros(4, np.float32), np.diag([4.0, 1.0, 0.25, 0.01]).astype(np.float32)
    )


def tabulated(table, index):
    """Noise that was drawn beforehand, for every example of a data set and every t from 0 to T."""
    return lambda t: jnp.asarray(table)[index, t]


def constant(eps):
    """The same noise at every t."""
    return lambda t: jnp.asarray(eps)
