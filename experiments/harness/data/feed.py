"""The batches of training steps, as arguments of the compiled step."""

import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.harness import devices
from experiments.harness.data import order, splits
from experiments.harness.data.sources.source import Source
from experiments.harness.data.stream import Batches, Stream, is_streamed
from experiments.harness.errors import ConfigError
from experiments.harness.processes import distributed

StepInput = tuple[splits.Examples, Any]  # the examples, and the indices of the batch or None


def require_same_data(source: Source) -> None:
    """Raises ConfigError, in every process, if the processes have different training sets."""
    checksum = zlib.crc32(repr(source.summary()).encode()) >> 1  # in 31 bits
    if distributed.in_any(checksum != distributed.broadcast_first(checksum)):
        raise ConfigError(
            f"process {jax.process_index()} has found {source.num_examples} training images of "
            f"shape {source.image_shape}, and the processes do not all have the same ones; give "
            "each of them the same files in config.data.data_dir"
        )


class Feed:
    """The batches of consecutive steps, as `make_train_step` takes them: (examples, indices).

    A small set is held on the devices, and the indices select a batch. The batches of a large set
    are streamed, and the indices are None. The batch of a step is the same in both cases.

        feed = Feed(config, mesh)
        with feed.start(first_step):
            state = train_step(state, *feed.next())

    Attributes:
      streamed: whether batches are streamed.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._source = splits.describe_data(config, "train")
        self._several = config.train.steps_per_dispatch
        self._step, self._seconds = 0, 0.0
        self._stream: Stream | None = None
        self.streamed = is_streamed(config.data, self._source)
        if self.streamed:
            size = config.train.batch_size
            part = devices.local_part(size)
            self._batches = Batches(self._source, config.seed, size, part)
        else:
            examples = splits.load_data(config, "train").examples(slice(None))
            self._held = devices.place(examples, devices.replicated(mesh))

    @contextmanager
    def start(self, first_step: int) -> Iterator[None]:
        """Sets the first step of `next`; in the body the workers of a stream decode ahead."""
        self._step, last = first_step, self._config.train.num_steps
        if not self.streamed or first_step >= last:
            yield
            return
        data = self._config.data
        with Stream(
            self._batches, first_step, last, workers=data.workers, prefetch=data.prefetch
        ) as self._stream:
            yield

    def next(self) -> StepInput:
        """The input of the next step, or of the next `train.steps_per_dispatch` steps, stacked."""
        began = time.monotonic()
        steps = range(self._step, self._step + self._several)
        stacked = self._several > 1
        if self._stream is None:
            inputs = self._held, self._indices(steps, stacked)
        else:
            inputs = self._joined([next(self._stream) for _ in steps], stacked), None
        self._step = steps.stop
        self._seconds += time.monotonic() - began
        return inputs

    def of_step(self, step: int) -> StepInput:
        """The input of any single step; a streamed batch is decoded here."""
        if not self.streamed:
            return self._held, self._indices([step], stacked=False)
        return self._joined([self._batches.examples(step)], stacked=False), None

    def read_waited(self) -> float:
        """Seconds that `next` has taken since the last call."""
        waited, self._seconds = self._seconds, 0.0
        return waited

    def _indices(self, steps: Sequence[int], stacked: bool) -> Any:
        size, num_examples = self._config.train.batch_size, self._source.num_examples
        each = [order.batch_indices(self._config.seed, s, num_examples, size) for s in steps]
        indices = np.stack(each) if stacked else each[0]
        if jax.process_count() == 1:
            return indices  # the step itself brings them to the devices faster
        return devices.place(indices, devices.split_batch(self._mesh, int(stacked)))

    def _joined(self, batches: Sequence[splits.Examples], stacked: bool) -> splits.Examples:
        batches = [splits.with_labels(self._config, batch, "train") for batch in batches]
        batch = jax.tree.map(lambda *arrays: np.stack(arrays), *batches) if stacked else batches[0]
        return devices.join_batch(batch, self._mesh, int(stacked))
