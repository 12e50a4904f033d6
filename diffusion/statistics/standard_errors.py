"""From per-example terms in nats to bits/dim with standard errors, on the host in float64.

There are two standard errors. `se` is over examples, as draws from a population. `mc_se` is over
the noise with the examples fixed: the standard deviation between evaluations with different seeds.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Estimate(NamedTuple):
    """A mean in bits/dim with both standard errors; `se` is NaN for a single example."""

    mean: float
    se: float
    mc_se: float


def bits_per_dim(
    nats: Float[np.ndarray, "*b"] | float, num_dims: int
) -> Float[np.ndarray, "*b"] | float:
    """Nats per example as bits per dimension."""
    return np.asarray(nats, np.float64) / (num_dims * np.log(2.0))


def replicate_timesteps(
    index: Int[np.ndarray, "b"], num_timesteps: int, num_replicates: int
) -> Int[np.ndarray, "b m"]:
    """Timesteps in 2 … T at which an example's KL is drawn twice, to measure its noise.

    They are evenly spaced and shifted from example to example by the golden ratio. So a data set
    covers all t about equally, and a row depends only on the index of its example.
    """
    num_terms = num_timesteps - 1
    m = min(num_replicates, num_terms)
    offset = np.mod(np.asarray(index, np.float64) * (np.sqrt(5) - 1) / 2, 1.0)
    position = (np.arange(m) + offset[:, None]) / max(m, 1)
    return (2 + np.floor(position * num_terms)).astype(np.int32)


def noise_variance(
    first: Float[np.ndarray, "b m"], second: Float[np.ndarray, "b m"], num_terms: int
) -> Float[np.ndarray, "b"]:
    """Variance of each example's sum of `num_terms` independent terms, from m pairs of draws.

    Half the squared difference of two draws is an unbiased estimate of a term's variance. The sum
    over the m terms is scaled to all terms.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    m = first.shape[1]
    return 0.5 * ((first - second) ** 2).sum(axis=1) * (num_terms / m if m else 0.0)


def estimate(
    per_example: Float[np.ndarray, "n"], noise_variances: Float[np.ndarray, "n"], num_dims: int
) -> Estimate:
    """The mean over examples in bits/dim, from nats and noise variances (nats²) per example."""
    values = bits_per_dim(per_example, num_dims)
    n = len(values)
    se = values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    total_variance = np.asarray(noise_variances, np.float64).sum()
    mc_se = bits_per_dim(np.sqrt(total_variance) / n, num_dims)
    return Estimate(float(values.mean()), float(se), float(mc_se))
