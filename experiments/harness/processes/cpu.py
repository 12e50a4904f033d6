"""Several devices made of one CPU, each of which computes its part of a batch."""

import os

import jax
from ml_collections import ConfigDict

MAX_DEVICES = 64
_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=1000000"


def divide(config: ConfigDict) -> None:
    """Has JAX make `devices.cpu` devices of the CPU; call it before any computation.

    XLA runs the operations of one device after another, and few operations of a small network are
    large enough to be shared by the cores. Two devices run theirs at the same time. The setting is
    left alone where several processes run together, where JAX_NUM_CPU_DEVICES or XLA_FLAGS give a
    number of devices, and where it is no permitted value, which the check of the config refuses.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    is_given = jax.config.jax_num_cpu_devices > 0 or "host_platform_device_count" in flags
    number = config.get("devices", {}).get("cpu", 1)
    is_permitted = isinstance(number, int) and 1 < number <= MAX_DEVICES
    if is_given or not is_permitted or jax.distributed.is_initialized():
        return
    # XLA would end a program whose devices wait for one another longer than this: one that was
    # suspended in the middle of a step.
    if "collective_call_terminate" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_PATIENCE}".strip()
    jax.config.update("jax_num_cpu_devices", number)
