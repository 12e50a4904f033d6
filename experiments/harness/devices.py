"""One mesh over all devices: the batch is split along `data`, everything else is replicated."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.harness.errors import ConfigError


def mesh() -> Mesh:
    """All devices along one axis, `data`.

    Raises:
      ConfigError: where several processes run together; data and logs know one process only.
    """
    if jax.process_count() > 1:
        raise ConfigError(f"{jax.process_count()} processes run together; only one is supported")
    return Mesh(np.array(jax.devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts a pytree of host arrays on the devices."""
    return jax.device_put(tree, sharding)


def check_batch(setting: str, batch_size: int) -> None:
    """Raises ConfigError unless the batch is positive and the devices divide it."""
    if batch_size < 1:
        raise ConfigError(f"{setting} = {batch_size}; it must be at least 1")
    devices = jax.device_count()
    if batch_size % devices:
        raise ConfigError(
            f"{setting} = {batch_size} does not split over {devices} devices; "
            f"use a multiple of {devices}, such as {-(-batch_size // devices) * devices}"
        )
