"""What is measured: a model with its parameters, and the data set that its bound is taken over."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion.model import DiffusionModel
from diffusion.schedules import Levels, Schedule
from experiments.harness import devices
from experiments.harness.data.batches import over_examples
from experiments.harness.data.splits import Dataset
from experiments.harness.processes import cores
from experiments.harness.setup.definition import ModelDefinition


class Subject(NamedTuple):
    """A model and a data set. The model may be a trained network or a closed form.

    Attributes:
      model: (params, labels) -> the model, given the labels of a batch.
      params: the networks' parameters; an argument of every compiled program.
      schedule: the noise schedule.
      levels: its T levels; like the parameters an argument of every program.
      dataset: the examples.
      to_data: images of the data set -> x_0 in data units.
      spacing: distance of neighbouring grey levels in data units; 0 for continuous data.
      seed: determines noise and times; an argument of every program.
      batch_size: examples in one call of a program.
      chunk_size: timesteps evaluated at once.
    """

    model: Callable[[Any, Int[Array, "b"] | None], DiffusionModel]
    params: Any
    schedule: Schedule
    levels: Levels
    dataset: Dataset
    to_data: Callable[[Array], Float[Array, "b *d"]]
    spacing: float
    seed: int
    batch_size: int
    chunk_size: int

    @property
    def num_examples(self) -> int:
        return len(self.dataset.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.dataset.images.shape[1:]

    @property
    def num_dims(self) -> int:
        return int(np.prod(self.shape))

    def padded_to_devices(self) -> "Subject":
        """The same with a batch of the examples alone, where they are fewer than a batch."""
        devices = jax.device_count()
        needed = cores.padded(-(-self.num_examples // devices) * devices)
        return self._replace(batch_size=min(self.batch_size, needed))

    def some(self, limit: int) -> "Subject":
        """The same with at most `limit` of the examples, evenly spaced."""
        examples = self.dataset.examples(slice(None, None, -(-self.num_examples // limit)))
        return self._replace(dataset=self.dataset._replace(**examples._asdict()))

    def over_examples(self, function: Callable, bar: tqdm | None = None, cost: int = 1) -> Any:
        """A function of example numbers over the whole data set; see `batches.over_examples`."""
        return over_examples(function, self.num_examples, self.batch_size, bar, cost)

    def over_draws(self, function: Callable, m: int, bar: tqdm | None = None, cost: int = 1) -> Any:
        """A function of (example numbers, draw numbers), for m draws of every example.

        Returns:
          Its results as [n, m, …]. A call has up to `chunk_size` times `batch_size` rows.
        """
        n, smallest = self.num_examples, self.batch_size
        batch_size = min(smallest * self.chunk_size, -(-n * m // smallest) * smallest)
        results = over_examples(
            lambda row: function(row // m, row % m), n * m, batch_size, bar, cost
        )
        return jax.tree.map(lambda a: a.reshape(n, m, *a.shape[1:]), results)


def subject_of(
    config: ConfigDict, definition: ModelDefinition, params: Any, dataset: Dataset
) -> Subject:
    """A network as the subject of a measurement.

    Args:
      config: `seed`, `evaluate.batch_size` and `evaluate.chunk_size` are used.
      definition: the model without parameters, a learned schedule tabulated.
      params: the networks' parameters.
      dataset: the examples.
    """
    return Subject(
        model=definition.model,
        params=devices.place(params, devices.replicated(devices.mesh())),
        schedule=definition.schedule,
        levels=definition.levels,
        dataset=dataset,
        to_data=definition.to_data,
        spacing=0.0 if definition.quantization is None else definition.quantization.spacing,
        seed=config.seed,
        batch_size=config.evaluate.batch_size,
        chunk_size=config.evaluate.chunk_size,
    )


def subject_of_model(
    model: DiffusionModel,
    x_0: Shaped[np.ndarray, "n *d"],
    seed: int,
    batch_size: int,
    chunk_size: int,
) -> Subject:
    """Any model as the subject of a measurement, without a config.

    Args:
      model: p. A condition has a row for each example.
      x_0: the examples, in data units.
      seed: determines noise and times.
      batch_size: examples in one call of a program.
      chunk_size: timesteps evaluated at once.

    Raises:
      ValueError: for no examples, examples that are not in data units, or a condition of another
        length.
    """
    condition = jax.tree.map(np.asarray, model.reverse.condition)
    if not x_0.size or not np.issubdtype(x_0.dtype, np.floating):
        raise ValueError(
            f"x_0 is {x_0.dtype} {x_0.shape}: it must hold at least one example, as floats in data "
            "units; convert grey levels with Quantization.to_data"
        )
    for leaf in jax.tree.leaves(condition):
        if leaf.shape[:1] != x_0.shape[:1]:
            raise ValueError(
                f"the condition is {leaf.shape}: it must have a row for each of the {len(x_0)} "
                "examples"
            )
    for start in range(0, len(x_0), batch_size):
        some = x_0[start : start + batch_size]
        model.decoder(some, some, some, model.levels)  # a discrete one refuses data off its levels
    return Subject(
        model=lambda params, condition: model.given(condition),
        params=(),
        schedule=Schedule(model.levels.log_snr[1:]),
        levels=model.levels,
        dataset=Dataset(x_0, condition, 0, "", ""),
        to_data=jnp.asarray,
        spacing=0.0,
        seed=seed,
        batch_size=batch_size,
        chunk_size=chunk_size,
    )
