"""Training batches of a set too large for memory, decoded ahead of time by worker processes.

The batch of step n depends on (seed, n) alone (`order.batch_indices`), not on the workers, the
prefetching or the first step. Workers use no accelerator: JAX is restricted to the CPU there before
a backend starts, and decoding starts none.
"""

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments.harness.data.order import batch_indices
from experiments.harness.data.sources.source import Source
from experiments.harness.data.splits import Examples
from experiments.harness.errors import RunError, in_short

MEBIBYTE = 2**20
_NEVER = 2**62  # bytes, more than any array has


def is_streamed(settings: ConfigDict, source: Source) -> bool:
    """Whether `config.data` asks for streaming a split, in place of holding it on the device."""
    is_large = source.num_bytes > settings.memory_limit_mb * MEBIBYTE
    return settings.stream == "always" or (settings.stream == "auto" and is_large)


class Batches:
    """The batch of a step as a function of its number; can be pickled.

    Args:
      source: the examples.
      seed: the run's seed.
      batch_size: examples in a batch, over all devices and processes.
      part: this process's part of a batch.
    """

    def __init__(self, source: Source, seed: int, batch_size: int, part: slice = slice(None)):
        self.num_examples, self.image_shape = source.num_examples, source.image_shape
        self.dtype = source.dtype
        self.seed, self.batch_size, self.part = seed, batch_size, part
        # A set that is stored as whole arrays is decoded here, once.
        self.in_memory = source.get is None
        self._get, self._arrays = source.get, None if source.get else source.read()

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Images and, if the set has them, labels."""
        indices = batch_indices(self.seed, step, self.num_examples, self.batch_size)[self.part]
        if self._arrays is not None:
            images, labels = self._arrays
            labels = None if labels is None else labels[indices]
            return _without_none(images=images[indices], labels=labels)
        images = np.empty((len(indices), *self.image_shape), self.dtype)
        labels = []
        for place, index in enumerate(indices.tolist()):
            images[place], label = self._get(index)
            labels.append(label)
        return _without_none(
            images=images, labels=None if None in labels else np.array(labels, np.int32)
        )

    def examples(self, step: int) -> Examples:
        """The batch as `Examples`."""
        return as_examples(self(step))


def as_examples(batch: dict[str, np.ndarray]) -> Examples:
    """A batch from `Batches`, which leaves out None for the sake of grain."""
    return Examples(*(batch.get(name) for name in Examples._fields))


class Stream:
    """The batches of consecutive steps, in order, decoded ahead of time. A context manager.

        with Stream(Batches(source, seed, batch_size), first_step, last_step) as batches:
            for examples in batches: ...

    The workers end with the block, and also if this process is killed.
    """

    def __init__(
        self,
        batches: Batches,
        first_step: int,
        last_step: int,
        *,
        workers: int = 4,
        prefetch: int = 2,
    ):
        """Starts nothing yet.

        Args:
          batches: the batch of each step.
          first_step, last_step: the 0-based steps, the last one excluded.
          workers: number of processes that decode; 0: a thread of this process. A set that is
            stored as whole arrays needs none.
          prefetch: number of batches that each worker decodes ahead.
        """
        self._steps = range(first_step, last_step)
        self._workers = 0 if batches.in_memory else min(workers, len(self._steps))
        self._prefetch, self._batches = prefetch, batches
        self._iterator: Any = None

    def __enter__(self) -> "Stream":
        import grain

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads flags, which a notebook has not parsed
        threads = 0 if self._workers else 1
        steps = grain.MapDataset.range(self._steps.start, self._steps.stop)
        batches = steps.map(self._batches).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * self._prefetch)
        )
        if self._workers:
            processes = grain.multiprocessing.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=self._prefetch
            )
            # Through pipes: as fast as shared memory, which a killed process would leave behind.
            batches = grain.experimental.WithOptionsIterDataset(
                batches, grain.experimental.DatasetOptions(min_shm_size=_NEVER)
            )
            batches = batches.mp_prefetch(processes, worker_init_fn=_prepare_worker)
        self._iterator = iter(batches)
        return self

    def __exit__(self, *_: object) -> None:
        self._iterator.close()

    def __iter__(self) -> Iterator[Examples]:
        return self

    def __next__(self) -> Examples:
        """The next step's examples.

        Raises:
          ConfigError: if an example cannot be decoded.
          RunError: if a worker was killed, for instance for lack of memory.
        """
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if self._workers and not isinstance(error, RunError):
                raise RunError(_death(error)) from error
            raise
        return as_examples(batch)


def _death(error: RuntimeError) -> str:
    """Why a worker died, as far as its exit code tells: a signal's is negative."""
    if re.search(r"exit code [1-9]", str(error)):
        reason = (
            "with an error, printed above; in a script, call the training below "
            'if __name__ == "__main__": since each such process imports the script'
        )
    else:
        reason = "perhaps for lack of memory"
    return (
        f"a process that decodes data has died, {reason} ({in_short(error)}); the same command "
        "goes on from the last checkpoint"
    )


def _without_none(**arrays: np.ndarray | None) -> dict[str, np.ndarray]:
    return {name: array for name, array in arrays.items() if array is not None}


def _prepare_worker(index: int, count: int) -> None:
    """Runs in each worker at its start."""
    # The main process handles the signals that end a run, and then ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """Ends this process when its parent ends, even by a kill."""
    parent.join()
    os._exit(1)
