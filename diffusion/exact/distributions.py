"""Distributions with closed-form marginals under noise: mixtures of normals, or of points.

The denoiser predicts x_0 and replaces a network; the decoder replaces p(x_0 | x_1). With them the
bound, the likelihood and the samplers can be compared with exact values.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key, PyTree

from diffusion.decoders import Decoder
from diffusion.forward import marginal
from diffusion.gaussian import expand
from diffusion.schedules import Array, Numbers, alpha, floats

einsum = functools.partial(jnp.einsum, precision="highest")  # a GPU's default is less precise


class Mixture(NamedTuple):
    """x_0 ~ Σ_k w_k N(m_k, C_k) in d dimensions, or the points m_k with probabilities w_k.

    `normal` and `points` make the two simplest ones.

    Attributes:
      weights: w_k > 0, up to a common factor.
      means: m_k, in data units.
      covariances: C_k, each symmetric and positive definite; None if the components are points,
        which must differ from each other.
    """

    weights: Float[Array, "k"]
    means: Float[Array, "k d"]
    covariances: Float[Array, "k d d"] | None

    @property
    def mean(self) -> Float[np.ndarray, "d"]:
        """E[x_0] = Σ_k w_k m_k."""
        return self._probabilities() @ np.asarray(self.means)

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Cov[x_0] = Σ_k w_k (C_k + (m_k − E[x_0])(m_k − E[x_0])ᵀ)."""
        weights, centred = self._probabilities(), np.asarray(self.means) - self.mean
        between = np.einsum("k,kd,ke->de", weights, centred, centred)
        if self.covariances is None:
            return between
        return np.einsum("k,kde->de", weights, self.covariances) + between

    def denoiser(
        self, x_t: Float[Array, "b d"], log_snr: Numbers, condition: PyTree | None = None
    ) -> Float[Array, "b d"]:
        """E[x_0 | x_t] = Σ_k p(k | x_t) [m_k + α C_k (α² C_k + σ² I)⁻¹ (x_t − α m_k)].

        There is no division by α, which is 5e-5 at λ = −20, nor by σ² alone.
        """
        del condition
        axes = self._axes()
        noised = axes.noised(x_t, log_snr)
        weights = noised.posterior()
        gain = expand(alpha(log_snr), noised.residual) * axes.variances
        shift = axes.to_data(gain / noised.variances * noised.residual)
        means = einsum("bk,kd->bd", weights[..., 0], axes.means)
        return means + jnp.sum(weights * shift, axis=1)

    def score(self, x_t: Float[Array, "b d"], log_snr: Numbers) -> Float[Array, "b d"]:
        """∇ log p(x_t) = −Σ_k p(k | x_t) (α² C_k + σ² I)⁻¹ (x_t − α m_k)."""
        axes = self._axes()
        noised = axes.noised(x_t, log_snr)
        pull = axes.to_data(noised.residual / noised.variances)
        return -jnp.sum(noised.posterior() * pull, axis=1)

    def noised_log_prob(self, x_t: Float[Array, "b d"], log_snr: Numbers) -> Float[Array, "b"]:
        """The log-density log Σ_k w_k N(x_t; α m_k, α² C_k + σ² I), in nats."""
        return jax.nn.logsumexp(self._axes().noised(x_t, log_snr).log_joint, axis=1)

    def log_prob(self, x_0: Float[Array, "b d"]) -> Float[Array, "b"]:
        """The log-density at x_0 in nats; for points the log-probability, −∞ elsewhere."""
        if self.covariances is not None:
            return self.noised_log_prob(x_0, jnp.full(len(x_0), jnp.inf))
        is_point = jnp.all(x_0[:, None] == jnp.asarray(self.means, float), axis=-1)
        log_weights = jnp.asarray(np.log(self._probabilities()), float)
        return jnp.max(jnp.where(is_point, log_weights, -jnp.inf), axis=-1)

    def decoder(self) -> Decoder:
        """The true p(x_0 | x_1) = q(x_1 | x_0) p(x_0)/p(x_1), as a log in nats per example."""

        def log_prob(x_0, x_1, x_0_hat, levels):
            del x_0_hat
            log_snr = jnp.full(jnp.shape(x_0)[0], levels.log_snr[1])
            likelihood = marginal(x_0, log_snr).log_prob(x_1)
            return likelihood + self.log_prob(x_0) - self.noised_log_prob(x_1, log_snr)

        return log_prob

    def sample(self, key: Key[Array, ""], n: int) -> Float[Array, "n d"]:
        """n independent draws."""
        if len(self.weights) == 1 and self.covariances is not None:
            return jax.random.multivariate_normal(key, self.means[0], self.covariances[0], (n,))
        axes = self._axes()
        key_of_k, key_of_eps = jax.random.split(key)
        k = jax.random.categorical(key_of_k, axes.log_weights, shape=(n,))
        eps = jax.random.normal(key_of_eps, (n, axes.means.shape[1]))
        # Every component transforms ε and one is chosen, without a d × d matrix for each draw.
        draws = axes.means + axes.to_data(jnp.sqrt(axes.variances) * eps[:, None])
        return jnp.take_along_axis(draws, k[:, None, None], axis=1)[:, 0]

    def entropy(self) -> float:
        """Entropy in nats: −Σ w log w of points, or ½ Σ log(2πe v) of one normal.

        v are the eigenvalues of its covariance.

        Raises:
          ValueError: for several normals, whose entropy has no closed form.
        """
        if self.covariances is None:
            weights = self._probabilities()
            return float(-weights @ np.log(weights))
        return float(0.5 * np.log(2 * np.pi * np.e * self._eigenvalues()).sum())

    def mutual_information(self, log_snr: float) -> float:
        """I(x_0; x_t) = ½ Σ log(1 + v SNR) of one normal, in nats; v as in `entropy`.

        Raises:
          ValueError: for several normals or for points.
        """
        return float(0.5 * np.logaddexp(0.0, np.log(self._eigenvalues()) + log_snr).sum())

    def optimal_eps_error(self, log_snr: float) -> float:
        """E‖ε − ε̂‖² = Σ v SNR/(1 + v SNR) of the optimal denoiser of one normal: 2 dI(x_0; x_t)/dλ.

        Raises:
          ValueError: for several normals or for points.

        Guo, Shamai and Verdú (2005).
        """
        # v SNR/(1 + v SNR) is a sigmoid of λ + log v.
        return float(np.exp(-np.logaddexp(0.0, -np.log(self._eigenvalues()) - log_snr)).sum())

    def _probabilities(self) -> Float[np.ndarray, "k"]:
        weights = np.asarray(self.weights)
        return weights / weights.sum()

    def _eigenvalues(self) -> Float[np.ndarray, "d"]:
        if self.covariances is None or len(self.weights) > 1:
            raise ValueError("there is a closed form for a single normal only")
        return np.linalg.eigvalsh(np.asarray(self.covariances[0], np.float64))

    def _axes(self) -> "_Axes":
        """Decomposes in float64 on the host, then rounds to the device's float type.

        Raises:
          ValueError: if a covariance is not positive definite.
        """
        weights = np.asarray(self.weights, np.float64)
        log_weights = np.log(weights) - np.log(weights.sum())
        variances, basis = np.zeros((len(weights), 1)), None
        if self.covariances is not None:
            variances, basis = np.linalg.eigh(np.asarray(self.covariances, np.float64))
            if not np.all(variances > 0):
                raise ValueError(
                    "a covariance must be positive definite; "
                    f"its smallest eigenvalue is {variances.min():g}"
                )
        parts = log_weights, self.means, variances, basis
        return _Axes(*jax.tree.map(lambda part: jnp.asarray(part, float), parts))


def normal(mean: Float[Array, "d"], covariance: Float[Array, "d d"]) -> Mixture:
    """x_0 ~ N(mean, covariance); the covariance is symmetric and positive definite."""
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    return Mixture(np.ones(1, mean.dtype), mean[None], covariance[None])


def points(values: Float[Array, "k d"]) -> Mixture:
    """x_0 is one of K distinct vectors, all equally likely: −log p(x_0) = log K."""
    return Mixture(np.ones(len(values)), values, None)


class _Axes(NamedTuple):
    """A mixture with each C_k in its own axes, where it stays diagonal under noise.

    Attributes:
      log_weights: log w_k, normalised.
      means: m_k.
      variances: the eigenvalues of C_k; one zero for a point.
      basis: the eigenvectors of C_k, in columns; None for points.
    """

    log_weights: Float[jax.Array, "k"]
    means: Float[jax.Array, "k d"]
    variances: Float[jax.Array, "k #d"]
    basis: Float[jax.Array, "k d d"] | None

    def from_data(self, x: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        """Data coordinates to the axes of each component."""
        return x if self.basis is None else einsum("bkd,kde->bke", x, self.basis)

    def to_data(self, x: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        """The axes of each component to data coordinates."""
        return x if self.basis is None else einsum("bkd,ked->bke", x, self.basis)

    def noised(self, x_t: Float[Array, "b d"], log_snr: Numbers) -> "_Noised":
        """The components of α x_0 + σ ε at x_t."""
        log_snr = jnp.reshape(floats(log_snr), (-1, 1, 1))
        signal = alpha(log_snr)
        # The square of x − α m_k, and not ‖x‖² − 2α x·m_k + …, which cancels at a high SNR.
        residual = self.from_data(jnp.asarray(x_t)[:, None] - signal * self.means)
        variances = signal**2 * self.variances + jax.nn.sigmoid(-log_snr)
        terms = residual**2 / variances + jnp.log(2 * jnp.pi * variances)
        log_joint = self.log_weights - 0.5 * jnp.sum(terms, axis=-1)
        return _Noised(log_joint, residual, variances)


class _Noised(NamedTuple):
    """The components of a noised mixture at x.

    Attributes:
      log_joint: log w_k N(x; α m_k, α² C_k + σ² I).
      residual: x − α m_k, in the component's axes.
      variances: α² v + σ² along these axes.
    """

    log_joint: Float[Array, "b k"]
    residual: Float[Array, "b k d"]
    variances: Float[Array, "b k #d"]

    def posterior(self) -> Float[Array, "b k 1"]:
        """p(k | x)."""
        return jax.nn.softmax(self.log_joint)[..., None]
