"""One mesh over all devices of all processes, and how arrays are laid out on it.

The batch is split over both axes of the mesh, `data` and `fsdp`. Parameters, their average and the
optimizer's state are replicated along `data` and split along `fsdp`. Every process runs the same
program on the same host values; `place` brings them to the devices, and `gather` back.
"""

from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.harness.errors import ConfigError

AXES = ("data", "fsdp")
SMALL = 1024  # arrays of fewer elements are replicated


class LargestOfProcesses:
    """The largest of all processes' numbers, which all of them get at the same call.

    The result is that of an earlier call, so that no call waits for the devices.
    """

    _LAG = 2

    def __init__(self, mesh: Mesh):
        self._split = split_batch(mesh)
        self._largest = jax.jit(jnp.max, out_shardings=replicated(mesh))
        self._pending: deque[jax.Array] = deque()

    def __call__(self, number: int, wait: bool = False) -> int:
        """The maximum of the call `_LAG` calls ago; with `wait`, of all calls up to this one."""
        if jax.process_count() == 1:
            return number
        numbers = np.full(jax.device_count(), number, np.int32)
        array = jax.make_array_from_callback(
            numbers.shape, self._split, lambda index: numbers[index]
        )
        self._pending.append(self._largest(array))
        largest = 0
        while len(self._pending) > (0 if wait else self._LAG):
            largest = max(largest, int(self._pending.popleft()))
        return largest


def mesh(config: ConfigDict | None = None) -> Mesh:
    """All devices: `devices.fsdp` of them along `fsdp`, the rest along `data`.

    The devices of a process are neighbours, so its examples of a batch are contiguous.

    Args:
      config: the config; None for an `fsdp` of one.

    Raises:
      ConfigError: if `devices.fsdp` does not divide the number of devices.
    """
    fsdp = 1 if config is None else config.devices.fsdp
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if fsdp < 1 or len(devices) % fsdp:
        raise ConfigError(
            f"config.devices.fsdp = {fsdp}; it must divide the number of devices, {len(devices)}"
        )
    return Mesh(np.array(devices).reshape(-1, fsdp), AXES)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The first axis after `leading` others is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, mesh.axis_names))


def shard_params(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """A sharding for each array: its largest axis that `fsdp` divides is split along `fsdp`.

    Arrays of fewer than `SMALL` elements, and those without such an axis, are replicated.

    Args:
      mesh: the devices.
      tree: pytree of arrays or their shapes.

    Returns:
      NamedShardings in the same structure.
    """
    size = mesh.shape.get("fsdp", 1)

    def sharding(leaf):
        divisible = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
        if size == 1 or leaf.size < SMALL or not divisible:
            return replicated(mesh)
        # The last of equal axes: the outputs of a kernel.
        largest = max(divisible, key=lambda axis: (leaf.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))

    return jax.tree.map(sharding, tree)


def place(tree: Any, sharding: Any) -> Any:
    """Puts a pytree on the devices.

    Args:
      tree: host arrays, equal in every process; or arrays on the devices.
      sharding: one for all arrays, or a pytree of shardings.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(leaf, sharding):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(lambda s, part: jax.tree.map(lambda a: put(a, s), part), sharding, tree)


def local_part(batch_size: int) -> slice:
    """This process's part of a batch's examples, for `join_batch`."""
    each = batch_size // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def join_batch(tree: Any, mesh: Mesh, leading: int = 0) -> Any:
    """A batch on the devices, from each process's own part of it.

    Args:
      tree: host arrays, of the examples of `local_part`.
      mesh: the devices.
      leading: number of axes before that of the examples.
    """
    sharding = split_batch(mesh, leading)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), tree)


def gather(tree: Any) -> Any:
    """A pytree as NumPy arrays, complete in every process."""

    def get(leaf):
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(get, tree)


def check_batch(setting: str, batch_size: int, parts: int = 1) -> None:
    """Raises ConfigError unless a batch size is a multiple of devices × parts."""
    devices = jax.device_count()
    multiple = devices * parts
    if batch_size % multiple:
        each = f"{devices} devices" if parts == 1 else f"{devices} devices in {parts} parts"
        raise ConfigError(
            f"{setting} = {batch_size} does not split over {each}; "
            f"use a multiple of {multiple}, such as {-(-batch_size // multiple) * multiple}"
        )
