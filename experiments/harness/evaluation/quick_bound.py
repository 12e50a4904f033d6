"""A cheap estimate of the bound on validation, for choosing a checkpoint."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.statistics.standard_errors import bits_per_dim, replicate_timesteps
from experiments.harness import devices
from experiments.harness.data import order, splits
from experiments.harness.evaluation import programs
from experiments.harness.setup.definition import ModelDefinition


def make_quick_bound(
    config: ConfigDict, definition: ModelDefinition, dataset: splits.Dataset
) -> Callable[[Any], float]:
    """The estimate as a function: params -> bits/dim.

    A few timesteps of each example stand for all of them. They and their noise are the same at
    every call, so that what is left of the noise falls out of a comparison.
    """
    mesh = devices.mesh()
    some = programs.make_terms_at(config, definition, mesh, draw=0)
    num_timesteps, n = definition.levels.num_timesteps, len(dataset.images)
    num_dims = int(np.prod(definition.image_shape))
    batches = list(order.padded_batches(n, config.evaluate.batch_size))

    def quick_bound(params: Any) -> float:
        total, levels = 0.0, definition.learned(params).levels
        for index, mask in batches:
            t = replicate_timesteps(index, num_timesteps, config.train.validation_timesteps)
            terms = jax.device_get(some(params, levels, dataset.examples(index), index, t))
            diffusion = terms.kl.mean(axis=1) * (num_timesteps - 1) if t.size else 0.0
            nats = terms.prior.astype(np.float64) + diffusion + terms.reconstruction
            total += nats[mask].sum()
        return float(bits_per_dim(total / n, num_dims))

    return quick_bound
