"""The cores of a CPU at work on one batch: a part of it each, in threads.

XLA runs most operations of a small network on a single core, one after another. Calls of a compiled
program from several threads run side by side, and the device stays one.
"""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

SMALLEST = 16  # examples; in smaller parts the calls themselves take too much of the time


def at_once(function: Callable[..., Any], *items: Iterable[Any]) -> list[Any]:
    """As `map`, in order; on a single CPU as many calls at once as it has cores."""
    return list(map(function, *items) if num_cores() == 1 else _pool().map(function, *items))


def batch_parts(size: int) -> list[slice]:
    """Equal parts of a batch of this size: at most one for each core, and none too small."""
    most = max(min(num_cores(), size // SMALLEST), 1)
    number = next(n for n in range(most, 0, -1) if size % n == 0)
    each = size // number
    return [slice(start, start + each) for start in range(0, size, each)]


def in_parts(function: Callable[..., Any], *arrays: Any) -> Any:
    """A function of examples, called with a part of them by each core.

    Args:
      function: takes pytrees of arrays [b, …], and returns one.
      *arrays: its arguments.

    Returns:
      Its result for all examples; of several parts, NumPy arrays.
    """
    parts = batch_parts(len(jax.tree.leaves(arrays)[0]))
    if len(parts) == 1:
        return function(*arrays)

    def call(part: slice) -> Any:
        return jax.device_get(function(*jax.tree.map(lambda a: np.asarray(a)[part], arrays)))

    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *at_once(call, parts))


def num_cores() -> int:
    """How many calls run at once: 1 on an accelerator, and where several devices share a batch."""
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_cores(), thread_name_prefix="core")
