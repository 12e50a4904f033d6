"""Compiled programs that all runs of a process share.

Each run makes its functions anew, and `jax.jit` would compile them again. A program is found by
its operations, not by a name: the function is traced again, in a fraction of the time, and a
program of the same operations, constants and shapes is used again. So changed code never gets an
old program, and whatever differs between two runs must be an argument for them to share.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

MAX_PROGRAMS = 64
MAX_CHARACTERS = 2**24  # of a program's text; one with more has large arrays as constants

_CALLBACK = "callback"  # in the text of a program that calls Python
_lock, _python = threading.Lock(), threading.Lock()
_programs: OrderedDict[Hashable, jax.stages.Compiled] = OrderedDict()


def compile_once(lowered: jax.stages.Lowered, args: tuple[Any, ...]) -> jax.stages.Compiled:
    """The program of a traced function, from this process's programs if it has one like it.

    The `MAX_PROGRAMS` that were used last are kept. Those that call Python are not: their text does
    not show which function they call.

    Args:
      lowered: the function, as `jax.jit(…).lower(*args)` gives it.
      args: its arguments.
    """
    return _compiled(lowered, lowered.as_text(), _signature(args))


def _compiled(lowered: jax.stages.Lowered, text: str, signature: Hashable) -> jax.stages.Compiled:
    if _CALLBACK in text or len(text) > MAX_CHARACTERS:
        return lowered.compile()
    digest = hashlib.sha256(text.encode()).digest()
    key = digest, lowered.out_tree, signature
    compiled = _programs.get(key) or lowered.compile()
    with _lock:
        _programs[key] = compiled
        _programs.move_to_end(key)
        while len(_programs) > MAX_PROGRAMS:
            _programs.popitem(last=False)
    return compiled


def share(jitted: Callable) -> Callable:
    """The same function, which `jax.jit` made, compiled by `compile_once` for each new shape.

    One that calls Python runs in one thread at a time: what it hands to Python is copied by threads
    of XLA, which two such programs can occupy both, and then wait for.
    """
    programs: dict[Hashable, Callable[..., Any]] = {}
    compiling = threading.Lock()

    def call(*args: Any) -> Any:
        signature = _signature(args)
        with compiling:
            if signature not in programs:
                lowered = jitted.lower(*args)
                text = lowered.as_text()
                program = _compiled(lowered, text, signature)
                programs[signature] = _one_at_a_time(program) if _CALLBACK in text else program
        return programs[signature](*args)

    return call


def _one_at_a_time(program: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with _python:
            return jax.block_until_ready(program(*args))

    return call


def _signature(args: tuple[Any, ...]) -> Hashable:
    """What a program is compiled for: settings of JAX, and structure, shapes, dtypes and places.

    The settings are those that tests and notebooks change on the way.
    """
    config = jax.config
    settings = (
        config.jax_enable_x64,
        config.jax_default_matmul_precision,
        getattr(config, "values", {}).get("jax_disable_most_optimizations"),
    )
    leaves, tree = jax.tree.flatten(args)
    return (
        settings,
        tree,
        tuple(
            (np.shape(leaf), getattr(leaf, "dtype", type(leaf)), getattr(leaf, "sharding", None))
            for leaf in leaves
        ),
    )
