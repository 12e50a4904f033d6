"""A cheap estimate of the bound on validation, for choosing a checkpoint."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.statistics.standard_errors import bits_per_dim, replicate_timesteps
from experiments.harness import devices
from experiments.harness.data import splits
from experiments.harness.data.batches import over_examples
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

    def quick_bound(params: Any) -> float:
        levels = definition.learned(params).levels

        def nats(index):
            t = replicate_timesteps(index, num_timesteps, config.train.validation_timesteps)
            terms = jax.device_get(some(params, levels, dataset.examples(index), index, t))
            diffusion = terms.kl.mean(axis=1) * (num_timesteps - 1) if t.size else 0.0
            return terms.prior.astype(np.float64) + diffusion + terms.reconstruction

        total = over_examples(nats, n, config.evaluate.batch_size).sum()
        return float(bits_per_dim(total / n, num_dims))

    return quick_bound
