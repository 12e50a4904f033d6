"""A control variate for the bound: the error of the optimal denoiser of Gaussian data.

This ‖ε − ε̂‖² is quadratic in ε, and its mean over ε is known for each x_0. Its deviation from the
mean correlates with the noise of a network's error. Subtracting a multiple of the deviation lowers
the variance of an estimated bound without changing its mean, and costs no network evaluation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion.gaussian import expand, sum_per_example
from diffusion.schedules import Array


class GaussianControl(NamedTuple):
    """A Gaussian fitted to data, along the eigenvectors of its covariance.

    Attributes:
      mean: mean of the flattened data.
      log_variance: log eigenvalues of their covariance.
      basis: its eigenvectors, in columns.
    """

    mean: Float[Array, "d"]
    log_variance: Float[Array, "d"]
    basis: Float[Array, "d d"]

    @classmethod
    def fit(cls, x_0: Float[Array, "n *d"], noise_variance: float) -> "GaussianControl":
        """Fits the Gaussian to data.

        `noise_variance` is added to the covariance, for directions without variation. The control
        is unbiased for any value; the variance of the quantisation error is a good one.
        """
        flat = np.asarray(x_0, np.float64).reshape(len(x_0), -1)
        centred = flat - flat.mean(axis=0)
        covariance = centred.T @ centred / len(flat) + noise_variance * np.eye(flat.shape[1])
        variances, basis = np.linalg.eigh(covariance)
        return cls(flat.mean(axis=0), np.log(variances), basis)

    def __call__(
        self, x_0: Float[Array, "b *d"], eps: Float[Array, "b *d"], log_snr: Float[Array, "b"]
    ) -> Float[Array, "b"]:
        """‖ε − ε̂‖² minus its mean over ε given x_0: its mean is zero for every x_0 and λ."""
        x = jnp.reshape(x_0, (len(x_0), -1)) - jnp.asarray(self.mean)
        both = jnp.stack([x, jnp.reshape(eps, x.shape)])
        x, e = jnp.matmul(both, jnp.asarray(self.basis), precision="highest")
        at = expand(log_snr, x) + jnp.asarray(self.log_variance)
        # ε − ε̂ = g ε − √SNR (1 − g) (x_0 − m), with the gain g = SNR v/(1 + SNR v).
        gain = jax.nn.sigmoid(at)
        shift = -jnp.exp(0.5 * expand(log_snr, x)) * jax.nn.sigmoid(-at) * x
        return sum_per_example(gain**2 * (e**2 - 1) + 2 * gain * shift * e)
