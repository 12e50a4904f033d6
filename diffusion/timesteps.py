"""How timesteps are drawn: a time in [0, 1) for each example, and what is made of it.

Times are uniform one by one, whether they are independent or stratified across the batch. They are
a continuous-time loss's own; a discrete loss turns them into t = 1 … T, uniformly or by importance.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

HISTORY_LENGTH = 10
UNIFORM_SHARE = 0.001


def uniform(key: Key[Array, ""], batch_size: int) -> Float[Array, "b"]:
    """Independent uniform times."""
    return jax.random.uniform(key, (batch_size,))


def stratified(key: Key[Array, ""], batch_size: int) -> Float[Array, "b"]:
    """One time in each of `batch_size` equal strata, by a common shift (Kingma et al. 2021, I.1).

    Each time is uniform, but they depend on one another: a standard error over the batch that takes
    them as independent is wrong.
    """
    shifted = jax.random.uniform(key) + jnp.arange(batch_size) / batch_size
    return jnp.mod(shifted, 1.0)


TIMES: dict[str, Callable[..., Float[Array, "b"]]] = {"uniform": uniform, "stratified": stratified}


def to_timestep(time: Float[Array, "b"], num_timesteps: int) -> Int[Array, "b"]:
    """t = 1 … T, each as likely, from a uniform time."""
    t = 1 + jnp.floor(time * num_timesteps).astype(jnp.int32)
    return jnp.minimum(t, num_timesteps)


class LossHistory(NamedTuple):
    """The last ten losses at each t, from which the importance of a t is told.

    Nichol and Dhariwal (2021), section 3.3.

    Attributes:
      squared: their squares, in a ring.
      count: how many losses each t has had.
    """

    squared: Float[Array, "T 10"]
    count: Int[Array, "T"]

    @classmethod
    def empty(cls, num_timesteps: int) -> "LossHistory":
        """No losses yet."""
        return cls(jnp.zeros((num_timesteps, HISTORY_LENGTH)), jnp.zeros(num_timesteps, jnp.int32))

    def probabilities(self) -> Float[Array, "T"]:
        """p(t) ∝ √E[L_t²], with a small uniform share; uniform until every t has ten losses."""
        importance = jnp.sqrt(self.squared.mean(axis=1))
        total = importance.sum()
        known = jnp.all(self.count >= HISTORY_LENGTH) & (total > 0)
        share = jnp.where(known, importance / jnp.where(total > 0, total, 1.0), 1 / len(self.count))
        return (1 - UNIFORM_SHARE) * share + UNIFORM_SHARE / len(self.count)

    def update(self, t: Int[Array, "b"], losses: Float[Array, "b"]) -> "LossHistory":
        """With a batch's losses added, unweighted; the last ten at each t stay, in batch order."""
        same = t[:, None] == t[None, :]
        before = jnp.sum(jnp.tril(same, -1), axis=1)
        after = jnp.sum(jnp.triu(same, 1), axis=1)
        place = (self.count[t - 1] + before) % HISTORY_LENGTH
        # A loss that ten later ones would overwrite is left out: no two are written to one place.
        row = jnp.where(after < HISTORY_LENGTH, t - 1, len(self.count))
        squared = self.squared.at[row, place].set(losses**2, mode="drop")
        return LossHistory(squared, self.count.at[t - 1].add(1))


def by_importance(
    time: Float[Array, "b"], probabilities: Float[Array, "T"]
) -> tuple[Int[Array, "b"], Float[Array, "b"]]:
    """t = 1 … T drawn from p(t), with the weights 1/(T p(t)) that keep a mean over uniform t.

    Stratified times give draws that are stratified over p.
    """
    cumulative = jnp.cumsum(probabilities)
    place = jnp.searchsorted(cumulative, time * cumulative[-1], side="right")
    index = jnp.minimum(place, len(probabilities) - 1)
    # The share of times that lead here, as it was rounded: p(t), but for the sum's rounding.
    share = jnp.diff(cumulative, prepend=0.0)[index] / cumulative[-1]
    return index + 1, 1 / (len(probabilities) * share)


class Proposal(NamedTuple):
    """A density of time on [0, 1), constant on equal bins: for evaluation, on the host.

    Attributes:
      density: in each bin; its mean is one.
    """

    density: Float[np.ndarray, "bins"]

    @classmethod
    def allocate(cls, std: Float[np.ndarray, "bins"], uniform_share: float = 0.1) -> "Proposal":
        """Draws in proportion to the standard deviation in each bin (Neyman's allocation).

        The uniform share guards against a bin whose standard deviation was underestimated: no
        weight exceeds its inverse.
        """
        std = np.asarray(std, np.float64)
        share = std / std.mean() if std.any() else np.ones_like(std)
        return cls((1 - uniform_share) * share + uniform_share)

    def time(self, uniform: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
        """Times of this density, from uniform ones: its inverse distribution function."""
        bins = len(self.density)
        cumulative = np.concatenate([[0.0], np.cumsum(self.density) / bins])
        time = np.interp(uniform, cumulative / cumulative[-1], np.arange(bins + 1) / bins)
        return np.minimum(time, np.nextafter(1.0, 0.0))

    def bin(self, time: Float[np.ndarray, "*b"]) -> Int[np.ndarray, "*b"]:
        """The bin that a time is in."""
        bins = len(self.density)
        return np.minimum((np.asarray(time) * bins).astype(int), bins - 1)

    def density_at(self, time: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
        """The density at times; a value over it is unbiased for the mean over uniform time."""
        return self.density[self.bin(time)]


def jittered(rng: np.random.Generator, num_examples: int, m: int) -> Float[np.ndarray, "n m"]:
    """m uniform times for each example, one in each of m equal strata, independently."""
    return (np.arange(m) + rng.random((num_examples, m))) / m
