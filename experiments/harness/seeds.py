"""One seed, several streams: what is drawn for one purpose never depends on another."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Key, UInt32

STREAMS = ("params", "train", "evaluate", "sample", "estimate", "probes")

Root = UInt32[Array | np.ndarray, "k"]
"""The key of a seed as an array, an argument of compiled programs: one program serves all seeds."""


@functools.lru_cache(maxsize=64)  # making it waits for the device
def root(seed: int) -> Root:
    """The key of a seed, on the host; it cannot be written to."""
    key = np.array(jax.random.key_data(jax.random.key(seed)))  # a copy: no array on a device stays
    key.setflags(write=False)
    return key


def stream(seed: int | Root, purpose: str) -> Key[Array, ""]:
    """The root key of a purpose, one of STREAMS; fold step, example or t into it."""
    key = jax.random.wrap_key_data(seed) if np.ndim(seed) else jax.random.key(seed)
    return jax.random.fold_in(key, STREAMS.index(purpose))
