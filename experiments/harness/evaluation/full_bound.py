"""The bound of every example of a data set, with the full sum over t."""

import jax
import numpy as np

from diffusion.bound import Bound
from diffusion.statistics.standard_errors import (
    bits_per_dim,
    estimate,
    noise_variance,
    replicate_timesteps,
)
from experiments.harness.evaluation import programs
from experiments.harness.evaluation.subject import Subject
from experiments.harness.processes.progress import progress


def full_bound(subject: Subject, replicates: int) -> tuple[Bound, np.ndarray]:
    """The bound's terms of every example, and the variance of each total's Monte-Carlo noise.

    Args:
      subject: the model and the examples.
      replicates: timesteps of each example whose KL is drawn a second time, for the variance.

    Returns:
      A Bound of float64 arrays in nats, [n, …], and the variances, [n] in nats².
    """
    first = programs.make_bound(subject)
    second = programs.make_terms_at(subject, draw=1)
    num_timesteps = subject.levels.num_timesteps
    cost = num_timesteps + min(replicates, num_timesteps - 1) + 1

    def run(index):
        t = replicate_timesteps(index, num_timesteps, replicates)
        once, again = jax.device_get((first(subject, index), second(subject, index, t)))
        return once, _noise_variance(once, again, t, num_timesteps)

    with progress(subject.num_examples * cost, "evaluate", "eval", unit_scale=True) as bar:
        return subject.over_examples(run, bar, cost)


def _noise_variance(once: Bound, again: Bound, t: np.ndarray, num_timesteps: int) -> np.ndarray:
    """Variance of each example's total, from two draws of some of its terms."""
    first = np.take_along_axis(once.kl, t - 2, axis=1)
    kl_variance = noise_variance(first, again.kl, num_timesteps - 1)
    return kl_variance + noise_variance(
        once.reconstruction[:, None], again.reconstruction[:, None], 1
    )


def summary(terms: Bound, noise_variances: np.ndarray, num_dims: int) -> dict[str, float]:
    """The bound in bits/dim with both standard errors, and its three parts."""
    total = estimate(terms.total, noise_variances, num_dims)
    parts = Bound(*(bits_per_dim(term, num_dims).mean(axis=0) for term in terms))
    return {
        "bits_per_dim": total.mean,
        "bits_per_dim_se": total.se,
        "bits_per_dim_mc_se": total.mc_se,
        "prior": float(parts.prior),
        "diffusion": float(parts.kl.sum()),
        "reconstruction": float(parts.reconstruction),
    }
