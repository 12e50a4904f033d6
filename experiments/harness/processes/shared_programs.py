"""Compiled programs that all runs of a process share.

Each run makes its functions anew, and `jax.jit` would compile them again. A program is found by
its operations, not by a name: the function is traced again, which takes seconds less, and a program
of the same operations, constants and shapes is used again. So changed code never gets an old
program, and whatever differs between two runs must be an argument for them to share.
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

_lock = threading.Lock()
_programs: OrderedDict[Hashable, jax.stages.Compiled] = OrderedDict()


def compile_once(lowered: jax.stages.Lowered, args: tuple[Any, ...]) -> jax.stages.Compiled:
    """The program of a traced function, from this process's programs if it has one like it.

    The `MAX_PROGRAMS` that were used last are kept. Those that call Python are not: their text does
    not show which function they call.

    Args:
      lowered: the function, as `jax.jit(…).lower(*args)` gives it.
      args: its arguments.
    """
    text = lowered.as_text()
    if "callback" in text or len(text) > MAX_CHARACTERS:
        return lowered.compile()
    digest = hashlib.sha256(text.encode()).digest()
    settings = str(sorted(jax.config.values.items()))  # some change how a program is compiled
    key = digest, lowered.out_tree, _signature(args), settings
    compiled = _programs.get(key) or lowered.compile()
    with _lock:
        _programs[key] = compiled
        _programs.move_to_end(key)
        while len(_programs) > MAX_PROGRAMS:
            _programs.popitem(last=False)
    return compiled


def share(jitted: Callable) -> Callable:
    """The same function, which `jax.jit` made, compiled by `compile_once` for each new shape."""
    programs: dict[Hashable, jax.stages.Compiled] = {}
    compiling = threading.Lock()

    def call(*args: Any) -> Any:
        signature = _signature(args)
        with compiling:
            if signature not in programs:
                programs[signature] = compile_once(jitted.lower(*args), args)
        return programs[signature](*args)

    return call


def _signature(args: tuple[Any, ...]) -> Hashable:
    """Structure, shapes and dtypes of arguments, and where arrays on the devices lie."""
    leaves, tree = jax.tree.flatten(args)
    return tree, tuple(
        (np.shape(leaf), getattr(leaf, "dtype", type(leaf)), getattr(leaf, "sharding", None))
        for leaf in leaves
    )
