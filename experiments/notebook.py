"""A trained run for a notebook: its bound, its samples and its model, from one call.

    run = load("runs/digits")
    print(run.bound("test"))
    images = run.sample(16)

Nothing is written to the work directory.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8
from ml_collections import ConfigDict

from configs import recorded
from diffusion.bound import Bound
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError
from experiments.harness.evaluation.full_bound import full_bound, summary
from experiments.harness.evaluation.subject import subject_of
from experiments.harness.sampling.draw import Drawer, to_grey_levels
from experiments.harness.setup import trained
from experiments.harness.workdir.record import open_run, recorded_config


class MeasuredBound(NamedTuple):
    """The bound of a model on a split, in bits/dim.

    Attributes:
      split: train, validation or test.
      bits_per_dim: the mean over examples.
      bits_per_dim_se: its standard error over examples, as draws from a population.
      bits_per_dim_mc_se: its standard error over noise, with the examples fixed.
      prior: mean KL of q(x_T | x_0) to p(x_T).
      diffusion: mean sum of the KLs at t = 2 … T.
      reconstruction: mean −log p(x_0 | x_1).
      terms: the terms of every example, in nats; float64.
    """

    split: str
    bits_per_dim: float
    bits_per_dim_se: float
    bits_per_dim_mc_se: float
    prior: float
    diffusion: float
    reconstruction: float
    terms: Bound

    def __repr__(self) -> str:
        parts = (f"{name} {getattr(self, name):.4f}" for name in self._fields[4:7])
        n, num_timesteps = self.terms.eps_error.shape
        return (
            f"{self.split}: {self.bits_per_dim:.4f} bits/dim ± {self.bits_per_dim_se:.4f} over "
            f"examples, ± {self.bits_per_dim_mc_se:.4f} over noise ({', '.join(parts)}; "
            f"{n} examples, T = {num_timesteps})"
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
        choose = None if num_examples is None else splits.first(num_examples)
        dataset = splits.load_measured(self.config, split, choose)
        subject = subject_of(self.config, self.definition, self.params, dataset)
        # Not padded beyond what the devices need.
        devices = jax.device_count()
        needed = -(-subject.num_examples // devices) * devices
        subject = subject._replace(batch_size=min(subject.batch_size, needed))
        if num_timesteps is not None:
            try:
                subject = subject._replace(levels=subject.schedule.levels(num_timesteps))
            except ValueError as error:
                raise ConfigError(f"bound: {error}") from error
        terms, variances = full_bound(subject, self.config.evaluate.replicates)
        return MeasuredBound(split, **summary(terms, variances, subject.num_dims), terms=terms)

    def sample(
        self, num_samples: int, num_timesteps: int | None = None
    ) -> UInt8[np.ndarray, "n h w c"]:
        """Grey levels of samples by the config's sampler; sample i depends on (seed, i) alone.

        Args:
          num_samples: n.
          num_timesteps: levels to step through; None for `sample.num_timesteps`, 0 for all of the
            schedule's.
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
