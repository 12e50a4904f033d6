"""What each call of the training step is given beside the state."""

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

Given = tuple[splits.Examples, Any]


def require_same_data(source: Source) -> None:
    """Raises ConfigError, in every process, if they have found different training sets.

    A batch would be one of each process's own set.
    """
    found = (source.num_examples, source.image_shape, source.fingerprint)
    told = zlib.crc32(repr(found).encode()) >> 1  # in 31 bits
    if distributed.in_any(told != distributed.of_first(told)):
        raise ConfigError(
            f"process {jax.process_index()} has found {source.num_examples} training images of "
            f"shape {source.image_shape}, and the processes do not all have the same ones; give "
            "each of them the same files in config.data.data_dir"
        )


class Feed:
    """The batches of consecutive steps, as `make_train_step` takes them: (examples, indices).

    A set that fits stays on the devices, and a batch is its indices; of a larger one the batches
    are streamed, and the indices None. The batch of a step is the same either way.

        feed = Feed(config, mesh)
        with feed.start(first_step):
            state = train_step(state, *feed.next())

    Attributes:
      streamed: which of the two it is.
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
        """`next` begins with this step; in the body a stream's workers decode ahead."""
        self._step, last = first_step, self._config.train.num_steps
        if not self.streamed or first_step >= last:
            yield
            return
        of = self._config.data
        with Stream(
            self._batches, first_step, last, workers=of.workers, prefetch=of.prefetch
        ) as self._stream:
            yield

    def next(self) -> Given:
        """Of the next step; with `train.steps_per_dispatch` = k > 1, of the next k."""
        began = time.monotonic()
        steps = range(self._step, self._step + self._several)
        stacked = self._several > 1
        if self._stream is None:
            given = self._held, self._indices(steps, stacked)
        else:
            given = self._joined([next(self._stream) for _ in steps], stacked), None
        self._step = steps.stop
        self._seconds += time.monotonic() - began
        return given

    def of_step(self, step: int) -> Given:
        """Of a single step, whichever; a streamed one is decoded here."""
        if not self.streamed:
            return self._held, self._indices([step], stacked=False)
        return self._joined([self._batches.examples(step)], stacked=False), None

    def read_waited(self) -> float:
        """Seconds that `next` has taken since this was last asked."""
        waited, self._seconds = self._seconds, 0.0
        return waited

    def _indices(self, steps: Sequence[int], stacked: bool) -> Any:
        size, num_examples = self._config.train.batch_size, self._source.num_examples
        found = [order.batch_indices(self._config.seed, s, num_examples, size) for s in steps]
        indices = np.stack(found) if stacked else found[0]
        if jax.process_count() == 1:
            return indices  # the step itself brings them to the devices, in less time
        return devices.place(indices, devices.split_batch(self._mesh, int(stacked)))

    def _joined(self, batches: Sequence[splits.Examples], stacked: bool) -> splits.Examples:
        batches = [splits.with_labels(self._config, batch, "train") for batch in batches]
        batch = jax.tree.map(lambda *of: np.stack(of), *batches) if stacked else batches[0]
        return devices.join_batch(batch, self._mesh, int(stacked))
