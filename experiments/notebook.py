"""One call for a bound with its errors, and one for a trained run.

    print(measure(model, x_0))  # any DiffusionModel

    run = load("runs/digits")
    print(run.bound("test"))
    images = run.sample(16)

Nothing is written to the work directory. The registries of data sets and networks are here too,
for parts of one's own (docs/extending.md).
"""

from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Shaped
from ml_collections import ConfigDict

from configs import recorded
from diffusion.bound import Bound
from diffusion.model import DiffusionModel
from diffusion.schedules import Array
from diffusion.statistics.standard_errors import Estimate
from experiments.harness.data import splits
from experiments.harness.data.sources.source import Source
from experiments.harness.data.splits import DATASETS
from experiments.harness.errors import ConfigError
from experiments.harness.evaluation.full_bound import full_bound, summary
from experiments.harness.evaluation.subject import Subject, subject_of, subject_of_model
from experiments.harness.sampling.draw import Drawer, to_grey_levels
from experiments.harness.setup import trained
from experiments.harness.setup.definition import MODELS
from experiments.harness.workdir.record import open_run, recorded_config

__all__ = ["DATASETS", "MODELS", "MeasuredBound", "Run", "Source", "load", "measure"]

REPLICATES = 32  # KLs of an example that are drawn a second time, for the error over noise


class MeasuredBound(NamedTuple):
    """The bound of a model on some examples, in bits/dim.

    For continuous data these are bits of a density, and may be negative.

    Attributes:
      split: train, validation or test; empty for examples that are no split of a data set.
      bits_per_dim: the mean over examples.
      bits_per_dim_se: its standard error over examples, as draws from a population.
      bits_per_dim_mc_se: its standard error over noise, with the examples fixed.
      prior: mean KL of q(x_T | x_0) to p(x_T).
      diffusion: mean sum of the KLs at t = 2 … T.
      reconstruction: mean −log p(x_0 | x_1).
      num_dims: the dimensions of an example.
      terms: the terms of every example, in nats; float64.
    """

    split: str
    bits_per_dim: float
    bits_per_dim_se: float
    bits_per_dim_mc_se: float
    prior: float
    diffusion: float
    reconstruction: float
    num_dims: int
    terms: Bound

    @property
    def nats(self) -> Estimate:
        """The bound in nats an example, with the same two errors: mean, se, mc_se."""
        nats_per_bit = self.num_dims * np.log(2.0)
        return Estimate(*(float(value * nats_per_bit) for value in self[1:4]))

    def __repr__(self) -> str:
        parts = (f"{name} {getattr(self, name):.4f}" for name in self._fields[4:7])
        n, num_timesteps = self.terms.eps_error.shape
        return (
            f"{self.split or 'bound'}: {self.bits_per_dim:.4f} bits/dim "
            f"± {self.bits_per_dim_se:.4f} over examples, "
            f"± {self.bits_per_dim_mc_se:.4f} over noise\n"
            f"    {', '.join(parts)}; {n} examples, T = {num_timesteps}"
        )


def measure(
    model: DiffusionModel,
    x_0: Shaped[Array, "n *d"],
    seed: int = 0,
    batch_size: int = 64,
    chunk_size: int = 16,
) -> MeasuredBound:
    """The bound (13.26) of any model on an array of examples, with the full sum over t.

    It costs T + 33 evaluations of the denoiser for each example, and 16 T bytes of memory. The
    noise is a function of (seed, example, t): two models that are measured on the same examples
    with the same seed see the same noise.

    Args:
      model: p. For another T give `model._replace(levels=schedule.levels(T))`. A condition has a
        row for each example.
      x_0: the examples in data units, on the decoder's grey levels if the decoder is discrete.
      seed: of the noise.
      batch_size: examples in one call of the compiled program.
      chunk_size: timesteps evaluated at once; the denoiser gets chunk_size · batch_size rows.

    Raises:
      ValueError: for no examples, examples that are not in data units, or a condition of another
        length.
    """
    x_0 = np.asarray(x_0)
    return _measured("", subject_of_model(model, x_0, seed, batch_size, chunk_size), REPLICATES)


def _measured(split: str, subject: Subject, replicates: int) -> MeasuredBound:
    terms, variances = full_bound(subject.padded_to_devices(), replicates)
    num_dims = subject.num_dims
    return MeasuredBound(
        split, **summary(terms, variances, num_dims), num_dims=num_dims, terms=terms
    )


class Run(trained.Run):
    """A trained run that can be measured and sampled; see `trained.Run` for its other parts."""

    def __repr__(self) -> str:
        num_timesteps = self.definition.levels.num_timesteps
        return f"Run({str(self.workdir)!r}, step {self.step}, T = {num_timesteps})"

    def bound(
        self,
        split: str = "test",
        num_examples: int | None = None,
        num_timesteps: int | None = None,
    ) -> MeasuredBound:
        """The bound (13.26) with the full sum over t.

        The same numbers as `--experiment=evaluate`: noise is a function of (seed, example, t). It
        costs T + `evaluate.replicates` + 1 evaluations of the network for each example.

        Args:
          split: train, validation or test.
          num_examples: only the first ones of the split; None for all.
          num_timesteps: T; None for that of the config.

        Raises:
          ConfigError: if there is no such split, or the schedule has no such levels.
        """
        dataset = self._dataset(split, num_examples)
        subject = subject_of(self.config, self.definition, self.params, dataset)
        if num_timesteps is not None:
            try:
                subject = subject._replace(levels=subject.schedule.levels(num_timesteps))
            except ValueError as error:
                raise ConfigError(f"bound: {error}") from error
        return _measured(split, subject, self.config.evaluate.replicates)

    def data(
        self, split: str = "test", num_examples: int | None = None
    ) -> Float[np.ndarray, "n *d"]:
        """x_0, the examples of a split in data units, as `measure` takes them.

        Args:
          split: train, validation or test.
          num_examples: only the first ones of the split; None for all.

        Raises:
          ConfigError: if there is no such split.
        """
        images = self._dataset(split, num_examples).images
        return np.asarray(self.definition.to_data(images))

    def _dataset(self, split: str, num_examples: int | None) -> splits.Dataset:
        choose = None if num_examples is None else splits.first(num_examples)
        return splits.load_measured(self.config, split, choose)

    def sample(
        self, num_samples: int, num_timesteps: int | None = None
    ) -> Shaped[np.ndarray, "n *d"]:
        """Samples by the config's sampler; sample i depends on (seed, i) alone.

        Args:
          num_samples: n.
          num_timesteps: levels to step through; None for `sample.num_timesteps`, 0 for all of the
            schedule's.

        Returns:
          uint8 grey levels [n, h, w, c]; of continuous data, floats [n, …] in data units.
        """
        if num_timesteps is None:
            num_timesteps = self.config.sample.num_timesteps
        drawer = Drawer(self.config, self.definition)
        x_0 = drawer(self.params, self.levels(num_timesteps), num_samples).x_0
        return to_grey_levels(self.definition, x_0)


def load(workdir: epath.PathLike, checkpoint: str = "best", **overrides: Any) -> Run:
    """Loads the EMA weights of a work directory with the config that it was trained with.

    Args:
      workdir: the work directory.
      checkpoint: "best" (lowest bound on validation) or "latest".
      **overrides: settings by name, as in `load(workdir, **{"evaluate.batch_size": 32})`.

    Raises:
      ConfigError: if the directory holds no run, or a setting does not fit it.
    """
    if recorded_config(workdir) is None:
        raise ConfigError(f"workdir={workdir} holds no config.json; train first")
    open_run(workdir)
    try:
        config: ConfigDict = recorded.get_config(str(workdir))
        config.update_from_flattened_dict(overrides)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return Run(*trained.load(config.lock(), workdir, checkpoint, writes=False))
