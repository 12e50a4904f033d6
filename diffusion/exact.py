"""Distributions whose optimal denoiser and log-likelihood are known in closed form.

Each denoiser predicts x_0 and goes wherever a network goes: the bound and the samplers can be
held against the truth.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key, PyTree

from diffusion.gaussian import expand
from diffusion.schedules import Array, alpha

matmul = functools.partial(jnp.matmul, precision="highest")  # a GPU's default is far from exact


class NormalData(NamedTuple):
    """x_0 ~ N(mean, covariance), in d dimensions.

    Attributes:
      mean: the mean.
      covariance: symmetric and positive definite.
    """

    mean: Float[Array, "d"]
    covariance: Float[Array, "d d"]

    def denoiser(
        self, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"], condition: PyTree | None = None
    ) -> Float[Array, "b d"]:
        """E[x_0 | x_t] = m + SNR C (SNR C + I)⁻¹ (x_t/α − m), along the eigenvectors of C."""
        del condition
        variances, basis = np.linalg.eigh(np.asarray(self.covariance, np.float64))
        mean, basis = jnp.asarray(self.mean), jnp.asarray(basis)
        # SNR v/(SNR v + 1) is a sigmoid of λ + log v.
        gain = jax.nn.sigmoid(expand(log_snr, x_t) + jnp.asarray(np.log(variances)))
        residual = x_t / expand(alpha(log_snr), x_t) - mean
        return mean + matmul(gain * matmul(residual, basis), basis.T)

    def log_prob(self, x_0: Float[Array, "b d"]) -> Float[Array, "b"]:
        """Log-density at x_0, in nats."""
        return jax.scipy.stats.multivariate_normal.logpdf(x_0, self.mean, self.covariance)

    def sample(self, key: Key[Array, ""], n: int) -> Float[Array, "n d"]:
        """n independent draws."""
        return jax.random.multivariate_normal(key, self.mean, self.covariance, (n,))

    def mutual_information(self, log_snr: float) -> float:
        """I(x_0; x_t) = ½ Σ log(1 + v SNR) in nats, over the eigenvalues v of the covariance."""
        variances = np.linalg.eigvalsh(np.asarray(self.covariance, np.float64))
        return float(0.5 * np.logaddexp(0.0, np.log(variances) + log_snr).sum())


class DiscreteData(NamedTuple):
    """x_0 is one of K vectors, each as likely as the others: −log p(x_0) = log K.

    Attributes:
      points: the vectors, in data units.
    """

    points: Float[Array, "K d"]

    def denoiser(
        self, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"], condition: PyTree | None = None
    ) -> Float[Array, "b d"]:
        """E[x_0 | x_t]: the points, weighted by a softmax of their log q(x_t | x_0)."""
        del condition
        points = jnp.asarray(self.points, x_t.dtype)
        # −‖x_t − αx‖²/2σ² up to a constant: SNR (x·x_t/α − ½‖x‖²).
        snr = jnp.exp(expand(log_snr, x_t))
        scaled = x_t / expand(alpha(log_snr), x_t)
        logits = snr * (matmul(scaled, points.T) - 0.5 * jnp.sum(points**2, axis=-1))
        return matmul(jax.nn.softmax(logits), points)

    def log_prob(self, x_0: Float[Array, "b d"]) -> Float[Array, "b"]:
        """Log-probability in nats: −log K at each of the points, −∞ elsewhere."""
        found = jnp.any(jnp.all(x_0[:, None] == jnp.asarray(self.points), axis=-1), axis=-1)
        return jnp.where(found, -jnp.log(float(len(self.points))), -jnp.inf)

    def sample(self, key: Key[Array, ""], n: int) -> Float[Array, "n d"]:
        """n independent draws."""
        return jnp.asarray(self.points)[jax.random.randint(key, (n,), 0, len(self.points))]
