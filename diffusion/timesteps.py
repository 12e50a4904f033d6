"""How times are drawn: a time in [0, 1) for each example, and its timestep.

Each time is uniform, and times are independent or stratified across the batch. A continuous-time
loss uses them directly; a discrete loss maps them to t = 1 … T, uniformly or by importance.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffusion.schedules import Numbers, floats

HISTORY_LENGTH = 10
UNIFORM_SHARE = 0.001


def uniform(key: Key[Array, ""], batch_size: int) -> Float[Array, "b"]:
    """Independent uniform times."""
    return jax.random.uniform(key, (batch_size,))


def stratified(key: Key[Array, ""], batch_size: int) -> Float[Array, "b"]:
    """One time in each of `batch_size` equal strata, with a common shift (Kingma et al. 2021, I.1).

    Each time is uniform, but the times of a batch are dependent: a standard error over the batch
    that assumes independence is wrong.
    """
    shifted = jax.random.uniform(key) + jnp.arange(batch_size) / batch_size
    return jnp.mod(shifted, 1.0)


TIMES: dict[str, Callable[..., Float[Array, "b"]]] = {"uniform": uniform, "stratified": stratified}


def to_timestep(time: Numbers, num_timesteps: int) -> Int[Array, "..."]:
    """t = 1 … T, all equally likely, from a uniform time."""
    t = 1 + jnp.floor(floats(time) * num_timesteps).astype(jnp.int32)
    return jnp.minimum(t, num_timesteps)


class LossHistory(NamedTuple):
    """The last ten losses at each t, which determine its importance.

    Nichol and Dhariwal (2021), section 3.3.

    Attributes:
      squared: squares of the losses, in a ring buffer.
      count: number of losses so far at each t.
    """

    squared: Float[Array, "T 10"]
    count: Int[Array, "T"]

    @classmethod
    def empty(cls, num_timesteps: int) -> "LossHistory":
        """A history without losses."""
        return cls(jnp.zeros((num_timesteps, HISTORY_LENGTH)), jnp.zeros(num_timesteps, jnp.int32))

    def probabilities(self) -> Float[Array, "T"]:
        """p(t) ∝ √E[L_t²] mixed with a small uniform part; uniform until all t have ten losses."""
        importance = jnp.sqrt(self.squared.mean(axis=1))
        total = importance.sum()
        is_full = jnp.all(self.count >= HISTORY_LENGTH) & (total > 0)
        share = jnp.where(
            is_full, importance / jnp.where(total > 0, total, 1.0), 1 / len(self.count)
        )
        return (1 - UNIFORM_SHARE) * share + UNIFORM_SHARE / len(self.count)

    def update(self, t: Int[Array, "b"], losses: Float[Array, "b"]) -> "LossHistory":
        """Adds the unweighted losses of a batch, in order; the last ten at each t remain."""
        same = t[:, None] == t[None, :]
        before = jnp.sum(jnp.tril(same, -1), axis=1)
        after = jnp.sum(jnp.triu(same, 1), axis=1)
        place = (self.count[t - 1] + before) % HISTORY_LENGTH
        # Losses that later ones of the batch overwrite are dropped: each slot is written once.
        row = jnp.where(after < HISTORY_LENGTH, t - 1, len(self.count))
        squared = self.squared.at[row, place].set(losses**2, mode="drop")
        return LossHistory(squared, self.count.at[t - 1].add(1))


def by_importance(
    time: Float[Array, "b"], probabilities: Float[Array, "T"]
) -> tuple[Int[Array, "b"], Float[Array, "b"]]:
    """t = 1 … T drawn from p(t), and the weights 1/(T p(t)) that give the mean over uniform t.

    Stratified times give draws that are stratified under p.
    """
    cumulative = jnp.cumsum(probabilities)
    place = jnp.searchsorted(cumulative, time * cumulative[-1], side="right")
    index = jnp.minimum(place, len(probabilities) - 1)
    # p(t) as the rounded cumulative sum has it, so that the weights match the draws.
    share = jnp.diff(cumulative, prepend=0.0)[index] / cumulative[-1]
    return index + 1, 1 / (len(probabilities) * share)


class Proposal(NamedTuple):
    """A density of time on [0, 1), constant on equal bins; for evaluation, on the host.

    Attributes:
      density: the density in each bin; its mean is one.
    """

    density: Float[np.ndarray, "bins"]

    @classmethod
    def allocate(cls, std: Float[np.ndarray, "bins"], uniform_share: float = 0.1) -> "Proposal":
        """A density proportional to the standard deviation in each bin (Neyman's allocation).

        The uniform share limits the weights to its inverse, in case the standard deviation of a bin
        is underestimated.
        """
        std = np.asarray(std, np.float64)
        share = std / std.mean() if std.any() else np.ones_like(std)
        return cls((1 - uniform_share) * share + uniform_share)

    def time(self, uniform: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
        """Times with this density from uniform ones, by the inverse distribution function."""
        bins = len(self.density)
        cumulative = np.concatenate([[0.0], np.cumsum(self.density) / bins])
        time = np.interp(uniform, cumulative / cumulative[-1], np.arange(bins + 1) / bins)
        return np.minimum(time, np.nextafter(1.0, 0.0))

    def bin(self, time: Float[np.ndarray, "*b"]) -> Int[np.ndarray, "*b"]:
        """The bin of each time."""
        bins = len(self.density)
        return np.minimum((np.asarray(time) * bins).astype(int), bins - 1)

    def density_at(self, time: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
        """The density at times. A value divided by it has the mean over uniform time."""
        return self.density[self.bin(time)]


def jittered(rng: np.random.Generator, num_examples: int, m: int) -> Float[np.ndarray, "n m"]:
    """m times for each example, independent and uniform in m equal strata."""
    return (np.arange(m) + rng.random((num_examples, m))) / m
