"""The networks' parameters: initial values, shapes and dtypes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.harness.seeds import Root, stream
from experiments.harness.setup.definition import ModelDefinition


def init_params(definition: ModelDefinition, seed: int | Root) -> Any:
    """The networks' parameters, a function of the seed, or of its `seeds.root`."""
    return _init(definition.network, definition.noise_schedule, definition.image_shape, seed)


def _init(
    network: nn.Module,
    noise_schedule: nn.Module | None,
    image_shape: tuple[int, ...],
    seed: int | Root,
) -> Any:
    key, x_t = stream(seed, "params"), jnp.zeros((1, *image_shape))
    params = {"network": jax.jit(network.init)(key, x_t, jnp.zeros(1))["params"]}
    if noise_schedule is not None:
        schedule_key = jax.random.fold_in(key, 1)
        params["noise_schedule"] = noise_schedule.init(schedule_key, jnp.zeros(1))["params"]
    return params


def abstract_params(definition: ModelDefinition) -> Any:
    """Shapes and dtypes of the networks' parameters; nothing is computed."""
    arguments = definition.network, definition.noise_schedule, definition.image_shape
    try:
        return _abstract_params(*arguments)
    except TypeError:  # a network whose fields cannot be hashed
        return _abstract_params.__wrapped__(*arguments)


@functools.lru_cache(maxsize=16)  # tracing a network takes half a second
def _abstract_params(
    network: nn.Module, noise_schedule: nn.Module | None, image_shape: tuple[int, ...]
) -> Any:
    return jax.eval_shape(lambda: _init(network, noise_schedule, image_shape, 0))
