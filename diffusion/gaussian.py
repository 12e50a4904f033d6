"""Gaussians with independent coordinates, one per example, as a pytree."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float, Shaped

from diffusion.schedules import Array, Numbers


def expand(
    per_example: Shaped[Array, "b"] | Numbers, like: Float[Array, "b *d"]
) -> Shaped[Array, "..."]:
    """Reshapes one number per example to [b, 1, …, 1], to broadcast against `like`."""
    per_example = jnp.asarray(per_example)
    return jnp.reshape(per_example, per_example.shape + (1,) * (jnp.ndim(like) - 1))


def sum_per_example(values: Float[Array, "b *d"]) -> Float[Array, "b"]:
    """The sum over every axis but the first."""
    return jnp.sum(values, axis=tuple(range(1, jnp.ndim(values))))


class Gaussian(NamedTuple):
    """N(mean, diag(variance)) for each example of a batch.

    Attributes:
      mean: the mean, in data units.
      variance: broadcastable to the mean. Zero is the point mass, which has no density.
    """

    mean: Float[Array, "b *d"]
    variance: Float[Array, "b ..."]

    def sample(self, eps: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
        """mean + std · eps, with a finite gradient at variance zero."""
        positive = self.variance > 0
        std = jnp.where(positive, jnp.sqrt(jnp.where(positive, self.variance, 1.0)), 0.0)
        return self.mean + std * eps

    def log_prob(self, x: Float[Array, "b *d"]) -> Float[Array, "b"]:
        """Log-density at x, in nats."""
        squared = (x - self.mean) ** 2 / self.variance
        return -0.5 * sum_per_example(squared + jnp.log(2 * jnp.pi * self.variance))

    def entropy(self) -> Float[Array, "b"]:
        """Differential entropy in nats."""
        log_variance = jnp.broadcast_to(jnp.log(self.variance), jnp.shape(self.mean))
        return 0.5 * sum_per_example(log_variance + jnp.log(2 * jnp.pi) + 1)

    def kl(self, other: "Gaussian") -> Float[Array, "b"]:
        """KL(self ‖ other) in nats."""
        ratio = self.variance / other.variance
        squared = (self.mean - other.mean) ** 2 / other.variance
        return 0.5 * sum_per_example(ratio - 1 - jnp.log(ratio) + squared)
