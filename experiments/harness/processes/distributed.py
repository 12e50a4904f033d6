"""Several processes that run one program together. The first one, process 0, writes files."""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.harness.errors import ConfigError, in_short
from experiments.harness.processes import cores

_PATIENCE = 300.0  # seconds to wait for the other processes


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
    if not automatic and num_processes < 1:
        raise ConfigError(f"--num_processes={num_processes}; it must be at least 1")
    if not automatic and not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id={process_id}; it must be in 0 … {num_processes - 1}")
    if not automatic:
        _check_address(coordinator, process_id == 0)
    where = f"--coordinator={coordinator}" if coordinator else "--distributed"
    try:
        with _patient(where):
            jax.distributed.initialize(
                coordinator, num_processes, process_id, initialization_timeout=2 * int(_PATIENCE)
            )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{where}: the processes did not find one another ({in_short(error)})"
        ) from error


def _check_address(coordinator: str, is_own: bool) -> None:
    """Raises ConfigError for an address at which JAX would crash, or wait in vain.

    Args:
      coordinator: address and port.
      is_own: whether this process shall listen there.
    """
    setting, parts = f"--coordinator={coordinator}", re.fullmatch(r"(\S+):(\d+)", coordinator)
    if not parts or "/" in coordinator or not 1 <= int(parts[2]) < 2**16:
        raise ConfigError(
            f"{setting}; it must be an address and a port in 1 … 65535, as in 10.0.0.1:1234"
        )
    try:
        socket.getaddrinfo(parts[1].strip("[]"), int(parts[2]))
        if is_own:
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", int(parts[2])))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or in_short(error)
        raise ConfigError(f"{setting} cannot be used ({reason}); give another") from error


@contextmanager
def _patient(where: str) -> Iterator[None]:
    """Ends the process with one line if the body takes too long, as JAX does with a core dump."""

    def give_up() -> None:
        print(
            f"error: {where}: not all processes came within {_PATIENCE:.0f} s; start the same "
            "command in each, with the same --coordinator and --num_processes",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(_PATIENCE, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_first() -> bool:
    """Whether this process is the one that writes files; initialises no device."""
    return not is_one_of_several() or jax.process_index() == 0


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
    """Exits at once if several processes run, or a core is at work; else returns the status.

    An orderly exit would wait for the other processes, and they may wait for this one; or for what
    the core computes, which nobody wants any more.
    """
    if is_one_of_several() or cores.are_at_work():
        sys.stdout.flush()
        sys.stderr.flush()
        # When the first process ends, all end: others with the same error may print it before.
        time.sleep(2.0 if is_one_of_several() and is_first() else 0.0)
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
    if is_one_of_several():
        raise ConfigError(
            f"{jax.process_count()} processes run together; {what} needs a single process"
        )
