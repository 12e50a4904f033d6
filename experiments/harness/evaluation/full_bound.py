"""The bound with the full sum over t, of every example of a data set."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.bound import Bound
from diffusion.statistics.standard_errors import (
    bits_per_dim,
    estimate,
    noise_variance,
    replicate_timesteps,
)
from experiments.harness import devices
from experiments.harness.data import splits
from experiments.harness.data.batches import over_examples
from experiments.harness.evaluation import programs
from experiments.harness.processes.progress import progress
from experiments.harness.setup.definition import ModelDefinition


def full_bound(
    config: ConfigDict, definition: ModelDefinition, params: Any, dataset: splits.Dataset
) -> tuple[Bound, np.ndarray]:
    """The bound's terms of every example, and the variance of each total's Monte-Carlo noise.

    Returns:
      A Bound of float64 arrays in nats, [n, …], and the variances, [n] in nats².
    """
    mesh = devices.mesh()
    first = programs.make_bound(config, definition, mesh)
    second = programs.make_terms_at(config, definition, mesh, draw=1)
    num_timesteps, batch_size = definition.levels.num_timesteps, config.evaluate.batch_size
    params = devices.place(params, devices.replicated(mesh))
    n = len(dataset.images)
    cost = num_timesteps + min(config.evaluate.replicates, num_timesteps - 1) + 1

    def run(index):
        examples = dataset.examples(index)
        t = replicate_timesteps(index, num_timesteps, config.evaluate.replicates)
        once = jax.device_get(first(params, definition.levels, examples, index))
        again = jax.device_get(second(params, definition.levels, examples, index, t))
        return once, _noise_variance(once, again, t, num_timesteps)

    with progress(n * cost, "evaluate", "eval", unit_scale=True) as bar:
        return over_examples(run, n, batch_size, bar, cost)


def _noise_variance(once: Bound, again: Bound, t: np.ndarray, num_timesteps: int) -> np.ndarray:
    """Variance of each example's total, from two draws of some of its terms."""
    first = np.take_along_axis(once.kl, t - 2, axis=1)
    of_sum = noise_variance(first, again.kl, num_timesteps - 1)
    return of_sum + noise_variance(once.reconstruction[:, None], again.reconstruction[:, None], 1)


def summary(
    terms: Bound, noise_variances: np.ndarray, definition: ModelDefinition
) -> dict[str, float]:
    """The bound in bits/dim with both standard errors, and its three parts."""
    num_dims = int(np.prod(definition.image_shape))
    total = estimate(terms.total, noise_variances, num_dims)
    parts = Bound(*(bits_per_dim(a, num_dims).mean(axis=0) for a in terms))
    return {
        "bits_per_dim": total.mean,
        "bits_per_dim_se": total.se,
        "bits_per_dim_mc_se": total.mc_se,
        "prior": float(parts.prior),
        "diffusion": float(parts.kl.sum()),
        "reconstruction": float(parts.reconstruction),
    }
