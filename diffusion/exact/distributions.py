"""Distributions whose noised marginals are known in closed form: a normal, a mixture, a set.

Each denoiser predicts x_0 and goes wherever a network goes, each decoder wherever a decoder goes:
the bound, the likelihood and the samplers can be held against the truth. At every log-SNR all
three are mixtures of normals: a normal has one component, and points have no covariance.
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
from diffusion.schedules import Array, alpha

einsum = functools.partial(jnp.einsum, precision="highest")  # a GPU's default is far from exact


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
        """E[x_0 | x_t] = m + α C (α² C + σ² I)⁻¹ (x_t − α m)."""
        del condition
        return _denoise(self._mixture(), x_t, log_snr)

    def score(self, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"]) -> Float[Array, "b d"]:
        """∇ log p(x_t) = −(α² C + σ² I)⁻¹ (x_t − α m)."""
        return _score(self._mixture(), x_t, log_snr)

    def noised_log_prob(
        self, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"]
    ) -> Float[Array, "b"]:
        """log N(x_t; α m, α² C + σ² I), in nats."""
        return _noised_log_prob(self._mixture(), x_t, log_snr)

    def log_prob(self, x_0: Float[Array, "b d"]) -> Float[Array, "b"]:
        """Log-density at x_0, in nats."""
        return _log_prob(self._mixture(), x_0)

    def decoder(self) -> Decoder:
        """The true p(x_0 | x_1), a density."""
        return _bayes_decoder(self)

    def sample(self, key: Key[Array, ""], n: int) -> Float[Array, "n d"]:
        """n independent draws."""
        return jax.random.multivariate_normal(key, self.mean, self.covariance, (n,))

    def entropy(self) -> float:
        """Differential entropy ½ Σ log(2πe v) in nats, over the eigenvalues v of the covariance."""
        return float(0.5 * np.log(2 * np.pi * np.e * self._variances()).sum())

    def mutual_information(self, log_snr: float) -> float:
        """I(x_0; x_t) = ½ Σ log(1 + v SNR) in nats, over the eigenvalues v of the covariance."""
        return float(0.5 * np.logaddexp(0.0, np.log(self._variances()) + log_snr).sum())

    def optimal_eps_error(self, log_snr: float) -> float:
        """E‖ε − ε̂‖² = Σ v SNR/(1 + v SNR) of the optimal denoiser: 2 dI(x_0; x_t)/dλ.

        Guo, Shamai and Verdú (2005): the information rises at half the error, per log-SNR.
        """
        # v SNR/(1 + v SNR) is a sigmoid of λ + log v.
        return float(np.exp(-np.logaddexp(0.0, -np.log(self._variances()) - log_snr)).sum())

    def _variances(self) -> Float[np.ndarray, "d"]:
        return np.linalg.eigvalsh(np.asarray(self.covariance, np.float64))

    def _mixture(self) -> "_Mixture":
        mean, covariance = np.asarray(self.mean), np.asarray(self.covariance)
        return _Mixture.of_normals(np.ones(1), mean[None], covariance[None])


class MixtureData(NamedTuple):
    """x_0 ~ Σ_k w_k N(m_k, C_k), in d dimensions.

    Attributes:
      weights: w_k > 0, up to a factor: they are normalised to sum to one.
      means: m_k.
      covariances: C_k, each symmetric and positive definite.
    """

    weights: Float[Array, "k"]
    means: Float[Array, "k d"]
    covariances: Float[Array, "k d d"]

    def denoiser(
        self, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"], condition: PyTree | None = None
    ) -> Float[Array, "b d"]:
        """E[x_0 | x_t]: each component's conditional mean, weighted by p(k | x_t)."""
        del condition
        return _denoise(self._mixture(), x_t, log_snr)

    def score(self, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"]) -> Float[Array, "b d"]:
        """∇ log p(x_t): each component's score, weighted by p(k | x_t)."""
        return _score(self._mixture(), x_t, log_snr)

    def noised_log_prob(
        self, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"]
    ) -> Float[Array, "b"]:
        """log Σ_k w_k N(x_t; α m_k, α² C_k + σ² I), in nats."""
        return _noised_log_prob(self._mixture(), x_t, log_snr)

    def log_prob(self, x_0: Float[Array, "b d"]) -> Float[Array, "b"]:
        """Log-density at x_0, in nats."""
        return _log_prob(self._mixture(), x_0)

    def decoder(self) -> Decoder:
        """The true p(x_0 | x_1), a density."""
        return _bayes_decoder(self)

    def sample(self, key: Key[Array, ""], n: int) -> Float[Array, "n d"]:
        """n independent draws."""
        mixture = self._mixture()
        key_of_k, key_of_eps = jax.random.split(key)
        k = jax.random.categorical(key_of_k, mixture.log_weights, shape=(n,))
        eps = jax.random.normal(key_of_eps, (n, mixture.means.shape[1]))
        # ε scaled and turned by every component, then the chosen one: no d × d matrix per draw.
        moved = mixture.means + mixture.from_axes(jnp.sqrt(mixture.variances) * eps[:, None])
        return jnp.take_along_axis(moved, k[:, None, None], axis=1)[:, 0]

    def _mixture(self) -> "_Mixture":
        return _Mixture.of_normals(self.weights, self.means, self.covariances)


class DiscreteData(NamedTuple):
    """x_0 is one of K vectors, each as likely as the others: −log p(x_0) = log K.

    Attributes:
      points: the vectors, in data units; no two are the same.
    """

    points: Float[Array, "K d"]

    def denoiser(
        self, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"], condition: PyTree | None = None
    ) -> Float[Array, "b d"]:
        """E[x_0 | x_t]: the points, weighted by a softmax of their log q(x_t | x_0)."""
        del condition
        return _denoise(self._mixture(), x_t, log_snr)

    def score(self, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"]) -> Float[Array, "b d"]:
        """∇ log p(x_t): −(x_t − α x)/σ² of each point x, weighted as in the denoiser."""
        return _score(self._mixture(), x_t, log_snr)

    def noised_log_prob(
        self, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"]
    ) -> Float[Array, "b"]:
        """The log-density log (1/K) Σ_x N(x_t; α x, σ² I), in nats."""
        return _noised_log_prob(self._mixture(), x_t, log_snr)

    def log_prob(self, x_0: Float[Array, "b d"]) -> Float[Array, "b"]:
        """Log-probability in nats: −log K at each of the points, −∞ elsewhere."""
        found = jnp.any(jnp.all(x_0[:, None] == jnp.asarray(self.points, float), axis=-1), axis=-1)
        return jnp.where(found, -self.entropy(), -jnp.inf)

    def decoder(self) -> Decoder:
        """The true p(x_0 | x_1), a probability."""
        return _bayes_decoder(self)

    def sample(self, key: Key[Array, ""], n: int) -> Float[Array, "n d"]:
        """n independent draws."""
        return jnp.asarray(self.points, float)[jax.random.randint(key, (n,), 0, len(self.points))]

    def entropy(self) -> float:
        """log K, in nats."""
        return float(np.log(len(self.points)))

    def _mixture(self) -> "_Mixture":
        n = len(self.points)
        log_weights = jnp.full(n, -self.entropy())
        return _Mixture(log_weights, jnp.asarray(self.points, float), jnp.zeros((n, 1)), None)


class _Mixture(NamedTuple):
    """Σ_k w_k N(m_k, C_k) with each C_k in its own axes, where it stays diagonal under noise.

    Attributes:
      log_weights: log w_k.
      means: m_k.
      variances: the eigenvalues of C_k, or one for all axes.
      basis: the eigenvectors of C_k, in columns; None where every axis is one.
    """

    log_weights: Float[jax.Array, "k"]
    means: Float[jax.Array, "k d"]
    variances: Float[jax.Array, "k #d"]
    basis: Float[jax.Array, "k d d"] | None

    @classmethod
    def of_normals(
        cls,
        weights: Float[Array, "k"],
        means: Float[Array, "k d"],
        covariances: Float[Array, "k d d"],
    ) -> "_Mixture":
        """Decomposes in float64 on the host, then rounds to the device's float type.

        Raises:
          ValueError: if a covariance is not positive definite.
        """
        weights = np.asarray(weights, np.float64)
        variances, basis = np.linalg.eigh(np.asarray(covariances, np.float64))
        if not np.all(variances > 0):
            raise ValueError(
                "a covariance must be positive definite; "
                f"its smallest eigenvalue is {variances.min():g}"
            )
        log_weights = np.log(weights) - np.log(weights.sum())
        return cls(*(jnp.asarray(of, float) for of in (log_weights, means, variances, basis)))

    def to_axes(self, x: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        """Data coordinates to each component's axes."""
        return x if self.basis is None else einsum("bkd,kde->bke", x, self.basis)

    def from_axes(self, x: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        """Each component's axes to data coordinates."""
        return x if self.basis is None else einsum("bkd,ked->bke", x, self.basis)


class _Components(NamedTuple):
    """The components of a noised mixture as seen from x.

    Attributes:
      log_joint: log w_k N(x; α m_k, α² C_k + σ² I).
      residual: x − α m_k, in the component's axes.
      variances: α² v + σ² along those axes.
    """

    log_joint: Float[Array, "b k"]
    residual: Float[Array, "b k d"]
    variances: Float[Array, "b k #d"]

    def posterior(self) -> Float[Array, "b k 1"]:
        """p(k | x)."""
        return jax.nn.softmax(self.log_joint)[..., None]


def _noised(mixture: _Mixture, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"]) -> _Components:
    """The components of α x_0 + σ ε at a log-SNR."""
    log_snr = jnp.asarray(log_snr)[:, None, None]
    signal = alpha(log_snr)
    # x − α m_k itself, squared, and not ‖x‖² − 2α x·m_k + …, which cancels at a high SNR.
    residual = mixture.to_axes(jnp.asarray(x_t)[:, None] - signal * mixture.means)
    variances = signal**2 * mixture.variances + jax.nn.sigmoid(-log_snr)
    terms = residual**2 / variances + jnp.log(2 * jnp.pi * variances)
    log_joint = mixture.log_weights - 0.5 * jnp.sum(terms, axis=-1)
    return _Components(log_joint, residual, variances)


def _log_prob(mixture: _Mixture, x_0: Float[Array, "b d"]) -> Float[Array, "b"]:
    """log Σ_k w_k N(x_0; m_k, C_k): no noise at λ = +∞."""
    return _noised_log_prob(mixture, x_0, jnp.full(len(x_0), jnp.inf))


def _noised_log_prob(
    mixture: _Mixture, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"]
) -> Float[Array, "b"]:
    """log Σ_k w_k N(x_t; α m_k, α² C_k + σ² I)."""
    return jax.nn.logsumexp(_noised(mixture, x_t, log_snr).log_joint, axis=1)


def _score(
    mixture: _Mixture, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"]
) -> Float[Array, "b d"]:
    """−Σ_k p(k | x_t) (α² C_k + σ² I)⁻¹ (x_t − α m_k)."""
    components = _noised(mixture, x_t, log_snr)
    pull = mixture.from_axes(components.residual / components.variances)
    return -jnp.sum(components.posterior() * pull, axis=1)


def _denoise(
    mixture: _Mixture, x_t: Float[Array, "b d"], log_snr: Float[Array, "b"]
) -> Float[Array, "b d"]:
    """Σ_k p(k | x_t) [m_k + α C_k (α² C_k + σ² I)⁻¹ (x_t − α m_k)].

    Nothing is divided by α, which is 5e-5 at λ = −20, nor by σ² alone.
    """
    components = _noised(mixture, x_t, log_snr)
    weights = components.posterior()
    gain = expand(alpha(jnp.asarray(log_snr)), components.residual) * mixture.variances
    shift = mixture.from_axes(gain / components.variances * components.residual)
    means = einsum("bk,kd->bd", weights[..., 0], mixture.means)
    return means + jnp.sum(weights * shift, axis=1)


def _bayes_decoder(data: NormalData | MixtureData | DiscreteData) -> Decoder:
    """log p(x_0 | x_1) = log q(x_1 | x_0) + log p(x_0) − log p(x_1), in nats per example."""

    def log_prob(x_0, x_1, x_0_hat, levels):
        del x_0_hat
        log_snr = jnp.full(jnp.shape(x_0)[0], levels.log_snr[1])
        likelihood = marginal(x_0, log_snr).log_prob(x_1)
        return likelihood + data.log_prob(x_0) - data.noised_log_prob(x_1, log_snr)

    return log_prob
