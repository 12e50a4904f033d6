"""Several processes that run one program together. The first one, process 0, writes files."""

import os
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.harness.errors import ConfigError


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    automatic: bool = False,
) -> None:
    """Joins the processes that run one program; does nothing without arguments.

    Call it once, before any computation on a device.

    Args:
      coordinator: address and port of process 0, such as 10.0.0.1:1234.
      num_processes: their number.
      process_id: the number of this one, from 0.
      automatic: whether to ask the cluster instead (Slurm, Open MPI, Kubernetes, TPU pods).

    Raises:
      ConfigError: if only some of the three are given, or the processes do not find one another.
    """
    arguments = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in arguments.items() if value is None]
    if automatic and len(missing) < len(arguments):
        raise ConfigError("--distributed finds the processes by itself; leave the others out")
    if not automatic and len(missing) == len(arguments):
        return
    if not automatic and missing:
        raise ConfigError(f"{', '.join(missing)} missing; processes that run together need all")
    if not automatic and not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id={process_id}; it must be in 0 … {num_processes - 1}")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        where = f"--coordinator={coordinator}" if coordinator else "--distributed"
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where}: the processes did not find one another ({reason})") from error


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def is_one_of_several() -> bool:
    """Whether other processes run together with this one; initialises no device."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def broadcast_first(number: int) -> int:
    """The first process's number, in all processes."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def wait_for_all(name: str) -> None:
    """Waits until every process is here, as before reading a file that the first has written."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def exit_without_waiting(status: int) -> int:
    """Exits at once if several processes run, which ends the others; else returns the status.

    An orderly exit would wait for the others, and they may wait for this process.
    """
    if is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        # When the first process ends, all end: others with the same error may print it before.
        time.sleep(2.0 if is_first() else 0.0)
        os._exit(status)
    return status


def end_all(message: str) -> None:
    """Prints an error and ends all processes, if there are several; else does nothing."""
    if is_one_of_several():
        print(f"error: {message}", file=sys.stderr)
        exit_without_waiting(1)


def in_any(flag: bool) -> bool:
    """Whether a flag is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def require_one_process(what: str) -> None:
    """Raises ConfigError if several processes run together."""
    if jax.process_count() > 1:
        raise ConfigError(
            f"{jax.process_count()} processes run together; {what} needs a single process"
        )
