"""Control variates for the bound: the errors of denoisers that are optimal for simpler data.

The mean of such an error ‖ε − ε̂‖² over ε is known for each x_0. Its deviation from the mean
correlates with the noise of a network's error. Subtracting a multiple of the deviation lowers the
variance of an estimated bound, and costs no network evaluation. It never changes the expected
value, whatever the simpler data are: those fitted here only determine the variance.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from diffusion.gaussian import expand, sum_per_example
from diffusion.schedules import Array

Control = Callable[..., Float[Array, "b"]]
"""(x_0, ε, λ [b]) -> ‖ε − ε̂‖² minus its mean over ε given x_0, a pytree of arrays."""

LEAST_LOG_PRIOR = -10.0
ROOM = 2**22  # numbers in an array of `PixelControl`
NODES = np.linspace(-5.5, 5.5, 45)  # of ε: the trapezoidal rule converges geometrically


class GaussianControl(NamedTuple):
    """The control of Gaussian data, whose error is a quadratic in ε.

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

        `noise_variance` is added to the covariance, for directions without variation. The variance
        of the quantisation error is a good value.
        """
        flat = np.asarray(x_0, np.float64).reshape(len(x_0), -1)
        centred = flat - flat.mean(axis=0)
        covariance = centred.T @ centred / len(flat) + noise_variance * np.eye(flat.shape[1])
        variances, basis = np.linalg.eigh(covariance)
        return cls(flat.mean(axis=0), np.log(variances), basis)

    def __call__(
        self, x_0: Float[Array, "b *d"], eps: Float[Array, "b *d"], log_snr: Float[Array, "b"]
    ) -> Float[Array, "b"]:
        """Its mean over ε is zero for every x_0 and λ."""
        x = jnp.reshape(x_0, (len(x_0), -1)) - jnp.asarray(self.mean)
        both = jnp.stack([x, jnp.reshape(eps, x.shape)])
        x, e = jnp.matmul(both, jnp.asarray(self.basis), precision="highest")
        at = expand(log_snr, x) + jnp.asarray(self.log_variance)
        # ε − ε̂ = g ε − √SNR (1 − g) (x_0 − m), with the gain g = SNR v/(1 + SNR v).
        gain = jax.nn.sigmoid(at)
        shift = -jnp.exp(0.5 * expand(log_snr, x)) * jax.nn.sigmoid(-at) * x
        return sum_per_example(gain**2 * (e**2 - 1) + 2 * gain * shift * e)

    def expectation(
        self, x_0: Float[Array, "b d"], log_snr: Float[Array, "b"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
        """What the rest of x_0 says about each coordinate, through noise of variance 1/SNR.

        Returns:
          The log-ratio of the conditional to the marginal density of the coordinate is a quadratic:
          its slope and its negative curvature at x_0.
        """
        centred, basis = x_0 - jnp.asarray(self.mean), jnp.asarray(self.basis)
        variances = jnp.exp(jnp.asarray(self.log_variance))
        # Q = SNR (I + SNR C)⁻¹ is the precision of the noised coordinates.
        left = jax.nn.sigmoid(-expand(log_snr, x_0) - jnp.asarray(self.log_variance))

        def diagonal(eigenvalues):
            return jnp.matmul(eigenvalues, basis.T**2, precision="highest")

        # A coordinate has the conditional mean x_j − (Q (x − m))_j/Q_jj, and variance
        # 1/Q_jj − 1/SNR.
        product = jnp.matmul(centred, basis, precision="highest") * left
        deviation = jnp.matmul(product, basis.T, precision="highest") / diagonal(left)
        precision = diagonal(left) / diagonal(variances * left)
        marginal = 1 / diagonal(variances)
        return marginal * centred - precision * deviation, precision - marginal


class PixelControl(NamedTuple):
    """The control of independent pixels on grey levels, each with a prior of its own.

    The prior is the pixel's distribution in the training data, multiplied by the ratio of the
    Gaussian's densities of the pixel with and without knowledge of the rest of x_0. It does not
    depend on ε, so the mean over ε is an integral in one dimension for each pixel.

    Attributes:
      gaussian: of the same data.
      values: the grey levels as data, with a constant spacing.
      log_marginal: the log-probability of each level, for each pixel.
    """

    gaussian: GaussianControl
    values: Float[Array, "k"]
    log_marginal: Float[Array, "d k"]

    @classmethod
    def fit(
        cls, levels: Integer[Array, "n *d"], values: Float[Array, "k"], gaussian: GaussianControl
    ) -> "PixelControl":
        """Counts the grey levels of each pixel; each counts once more than it occurs."""
        flat, k = np.asarray(levels).reshape(len(levels), -1), len(values)
        d = flat.shape[1]
        counts = np.bincount((flat + k * np.arange(d)).ravel(), minlength=d * k).reshape(d, k)
        return cls(gaussian, np.asarray(values, np.float64), np.log((counts + 1) / (len(flat) + k)))

    def __call__(
        self, x_0: Float[Array, "b *d"], eps: Float[Array, "b *d"], log_snr: Float[Array, "b"]
    ) -> Float[Array, "b"]:
        """Its mean over ε is zero for every λ, and every x_0 on the grey levels."""
        x, e = (jnp.reshape(array, (len(x_0), -1)) for array in (x_0, eps))
        slope, curvature = self.gaussian.expectation(x, jnp.asarray(log_snr))
        # A few examples at a time: each needs arrays of d × 2 K numbers.
        batch_size = max(1, ROOM // (2 * np.size(self.log_marginal)))
        examples = x, e, log_snr, slope, curvature
        return jax.lax.map(lambda of: self._of_one(*of), examples, batch_size=batch_size)

    def _of_one(
        self,
        x_0: Float[Array, "d"],
        eps: Float[Array, "d"],
        log_snr: Float[Array, ""],
        slope: Float[Array, "d"],
        curvature: Float[Array, "d"],
    ) -> Float[Array, ""]:
        """Of one example; slope (v − x_0) − ½ curvature (v − x_0)² is added to the log-prior."""
        values, num_levels = jnp.asarray(self.values), len(self.values)
        spacing = values[1] - values[0]
        # Levels relative to the level of x_0, from −(K − 1) to K − 1; K of these exist.
        steps = jnp.arange(1 - num_levels, num_levels)
        level = jnp.round((x_0 - values[0]) / spacing).astype(int)[:, None] + steps
        exists = (level >= 0) & (level < num_levels)
        shift = spacing * steps
        log_prior = jnp.take_along_axis(
            jnp.asarray(self.log_marginal), jnp.clip(level, 0, num_levels - 1), axis=1
        )
        log_prior += slope[:, None] * shift - 0.5 * curvature[:, None] * shift**2
        log_prior = jax.nn.log_softmax(jnp.where(exists, log_prior, -jnp.inf))
        # The bound keeps the error smooth enough in ε for the quadrature.
        prior = jnp.where(exists, jnp.exp(jnp.maximum(log_prior, LEAST_LOG_PRIOR)), 0.0)
        steps = jnp.exp(0.5 * log_snr) * shift  # in units of the noise of x_t

        nodes = jnp.asarray(NODES, prior.dtype)
        likelihood = jnp.exp(-0.5 * (nodes - steps[:, None]) ** 2)
        both = jnp.stack([prior * steps, prior])
        moment, total = jnp.matmul(both, likelihood, precision="highest")
        weights = jnp.exp(-0.5 * nodes**2)
        mean = jnp.sum((moment / total) ** 2 * weights, axis=1) / jnp.sum(weights)

        likelihood = jnp.exp(-0.5 * (eps[:, None] - steps) ** 2)
        moment, total = jnp.sum(both * likelihood, axis=-1)
        return jnp.sum((moment / total) ** 2 - mean)
