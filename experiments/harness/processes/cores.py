"""The cores of a CPU at work on one batch: a part of it each, in threads.

XLA runs most operations of a small network on a single core, one after another. Calls of a compiled
program from several threads run side by side, and the device stays one.
"""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

SMALLEST = 16  # examples; in smaller parts the calls themselves take too much of the time

_calls: list[Future] = []  # those that are waited for, or run on after an error or a signal


def at_once(function: Callable[..., Any], *items: Iterable[Any]) -> list[Any]:
    """The list of `map(function, *items)`; on a single CPU it makes a call on each core at once.

    In the threads of the calls JAX has the precision and the debugging settings of the caller.
    """
    arguments = list(zip(*items, strict=True))
    if num_cores() == 1 or len(arguments) == 1:
        return [function(*each) for each in arguments]
    function = _with_settings(function)
    _calls[:] = [_pool().submit(function, *each) for each in arguments]
    results = [call.result() for call in _calls]
    _calls.clear()  # they hold the results
    return results


def are_at_work() -> bool:
    """Whether calls still run, which an orderly exit of the process would wait for."""
    return not all(call.done() for call in _calls)


def _with_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with settings that a `with` statement of JAX changes in one thread only."""
    config = jax.config
    is_double, precision = config.jax_enable_x64, config.jax_default_matmul_precision
    finds_nans = config.jax_debug_nans

    def call(*args: Any) -> Any:
        with (
            jax.enable_x64(is_double),
            jax.default_matmul_precision(precision),
            jax.debug_nans(finds_nans),
        ):
            return function(*args)

    return call


def batch_parts(size: int) -> list[slice]:
    """Equal parts of a batch, at most one for each core, of `SMALLEST` examples or more."""
    number = next(n for n in range(_most_parts(size), 0, -1) if size % n == 0)
    each = size // number
    return [slice(start, start + each) for start in range(0, size, each)]


def padded(size: int) -> int:
    """The least size from this one on of which each core gets a part, unless they are too small."""
    return size + -size % _most_parts(size)


def _most_parts(size: int) -> int:
    return max(min(num_cores(), size // SMALLEST), 1)


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
