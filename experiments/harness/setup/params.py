"""The networks' parameters: initial values, shapes and dtypes."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness.seeds import stream
from experiments.harness.setup.definition import ModelDefinition


def init_params(definition: ModelDefinition, seed: int) -> Any:
    """The networks' parameters, a function of the seed."""
    key, x_t = stream(seed, "params"), jnp.zeros((1, *definition.image_shape))
    params = {"network": jax.jit(definition.network.init)(key, x_t, jnp.zeros(1))["params"]}
    if definition.noise_schedule is not None:
        schedule_key = jax.random.fold_in(key, 1)
        params["noise_schedule"] = definition.noise_schedule.init(schedule_key, jnp.zeros(1))[
            "params"
        ]
    return params


def abstract_params(definition: ModelDefinition) -> Any:
    """Shapes and dtypes of the networks' parameters; nothing is computed."""
    return jax.eval_shape(lambda: init_params(definition, 0))
