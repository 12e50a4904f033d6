"""The order of examples: a function of (seed, step) in training, and as stored elsewhere."""

import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int32

from experiments.harness.data.sources.source import permutation


def batch_indices(
    seed: int, step: int, num_examples: int, batch_size: int
) -> Int32[np.ndarray, "batch_size"]:
    """The places of the examples of a training step's batch.

    The steps go through epochs, each with a new permutation of the set. A batch may contain the
    end of one epoch and the start of the next; all batches have the same size.

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
    order.flags.writeable = False  # callers share the cached array
    return order


def padded_batches(
    num_examples: int, batch_size: int
) -> Iterator[tuple[Int32[np.ndarray, "batch_size"], Bool[np.ndarray, "batch_size"]]]:
    """Every example once, in order, in batches of one size.

    Yields:
      Indices, and a mask. Repeats of the last example fill the last batch; the mask is False there.
    """
    for start in range(0, num_examples, batch_size):
        positions = np.arange(start, start + batch_size, dtype=np.int32)
        yield np.minimum(positions, num_examples - 1), positions < num_examples
