"""Which examples a batch holds: a function of (seed, step) in training, in order elsewhere."""

import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int32

from experiments.harness.data.sources.source import permutation


def batch_indices(
    seed: int, step: int, num_examples: int, batch_size: int
) -> Int32[np.ndarray, "batch_size"]:
    """Which examples training step number `step` sees.

    The steps walk through epochs, each a fresh permutation of the set. A batch may end one epoch
    and begin the next; none is cut short.

    Args:
      seed: the run's seed.
      step: 0-based.
      num_examples: size of the set.
      batch_size: examples in a batch, over all devices; may exceed num_examples.
    """
    positions = np.int64(step) * batch_size + np.arange(batch_size)
    epochs, offsets = np.divmod(positions, num_examples)
    indices = np.empty(batch_size, np.int32)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        indices[inside] = _epoch_order(seed, int(epoch), num_examples)[offsets[inside]]
    return indices


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> Int32[np.ndarray, "num_examples"]:
    order = permutation((seed % 2**64, epoch), num_examples).astype(np.int32)
    order.flags.writeable = False  # every caller shares the cached array
    return order


def padded_batches(
    num_examples: int, batch_size: int
) -> Iterator[tuple[Int32[np.ndarray, "batch_size"], Bool[np.ndarray, "batch_size"]]]:
    """Every example once, in order, in batches of one size.

    Yields:
      indices, and a mask that is False where the last batch is filled up with repeats of the last
      example.
    """
    for start in range(0, num_examples, batch_size):
        positions = np.arange(start, start + batch_size, dtype=np.int32)
        yield np.minimum(positions, num_examples - 1), positions < num_examples
