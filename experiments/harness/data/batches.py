"""A function of examples, run over a whole data set in batches of one size."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32
from tqdm import tqdm

from experiments.harness.data.order import padded_batches

Function = Callable[[Int32[np.ndarray, "b"]], Any]


def batch_results(
    function: Function, num_examples: int, batch_size: int, bar: tqdm | None = None, cost: int = 1
) -> Iterator[Any]:
    """Runs a function on every example exactly once, in order, and yields batch after batch.

    Args:
      function: example numbers [batch_size] -> pytree of arrays [batch_size, …].
      num_examples: size of the data set.
      batch_size: examples in a call. The last call is filled up with repeats of the last example,
        whose results are left out.
      bar: counts the examples, each as `cost` units.
      cost: units of the bar for each example.

    Yields:
      The results as float64 host arrays [≤ batch_size, …].
    """
    for index, mask in padded_batches(num_examples, batch_size):
        results = jax.device_get(function(index))
        yield jax.tree.map(lambda a, mask=mask: np.asarray(a, np.float64)[mask], results)
        if bar is not None:
            bar.update(int(mask.sum()) * cost)


def over_examples(
    function: Function, num_examples: int, batch_size: int, bar: tqdm | None = None, cost: int = 1
) -> Any:
    """As `batch_results`, but with the batches concatenated: float64 arrays [num_examples, …]."""
    parts = batch_results(function, num_examples, batch_size, bar, cost)
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
