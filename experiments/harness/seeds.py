"""One seed, several streams: what is drawn for one purpose never depends on another."""

import jax
from jaxtyping import Array, Key

STREAMS = ("params", "train", "evaluate", "sample", "estimate", "probes")


def stream(seed: int, purpose: str) -> Key[Array, ""]:
    """The root key of a purpose, one of STREAMS; fold step, example or t into it."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS.index(purpose))
