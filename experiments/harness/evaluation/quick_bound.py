"""A cheap estimate of the bound on validation, for choosing a checkpoint."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.statistics.standard_errors import bits_per_dim, replicate_timesteps
from experiments.harness.data.splits import Dataset
from experiments.harness.evaluation import programs
from experiments.harness.evaluation.subject import subject_of
from experiments.harness.setup.definition import ModelDefinition


def make_quick_bound(
    config: ConfigDict, definition: ModelDefinition, dataset: Dataset
) -> Callable[[Any], float]:
    """The estimate as a function: params -> bits/dim.

    A few timesteps of each example stand for all. They and their noise are the same at every call,
    so that most of the noise cancels in a comparison.
    """
    subject = subject_of(config, definition, None, dataset)
    some = programs.make_terms_at(subject, draw=0)
    num_timesteps = definition.levels.num_timesteps

    def quick_bound(params: Any) -> float:
        now = subject._replace(params=params, levels=definition.learned(params).levels)

        def nats(index):
            t = replicate_timesteps(index, num_timesteps, config.train.validation_timesteps)
            terms = jax.device_get(some(now, index, t))
            diffusion = terms.kl.mean(axis=1) * (num_timesteps - 1) if t.size else 0.0
            return np.float64(terms.prior) + diffusion + terms.reconstruction

        mean = now.over_examples(nats).mean()
        return float(bits_per_dim(mean, subject.num_dims))

    return quick_bound
