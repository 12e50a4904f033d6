"""A trained run: what a work directory holds, ready to be measured or sampled."""

import json
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from configs.settings.declaration import unknown
from diffusion.model import DiffusionModel
from diffusion.schedules import Levels
from diffusion.spacing import SPACINGS
from diffusion.variances import VARIANCES
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError
from experiments.harness.processes import distributed
from experiments.harness.setup import analytic
from experiments.harness.setup.definition import ModelDefinition, define_model
from experiments.harness.setup.optimal_steps import optimal_levels
from experiments.harness.setup.params import abstract_params
from experiments.harness.workdir import provenance, record
from experiments.harness.workdir.checkpoints import Checkpoints, RemovedError
from experiments.harness.workdir.files import read, require_shape, write_npz

_ATTEMPTS = 5  # a training that goes on in the directory may remove the chosen checkpoint


class Run(NamedTuple):
    """A trained model and the work directory that it comes from.

    Attributes:
      config: the config.
      workdir: where it was trained, and where results are written.
      definition: the model without parameters. A learned schedule is already tabulated.
      params: the EMA weights.
      step: the training step of the weights.
      writes: whether measured errors are saved in the work directory.
    """

    config: ConfigDict
    workdir: epath.Path
    definition: ModelDefinition
    params: Any
    step: int
    writes: bool = True

    def model(self, labels: Int[Array, "b"] | None = None) -> DiffusionModel:
        """The generative model, given labels; None for none."""
        return self.definition.model(self.params, labels)

    def levels(self, num_timesteps: int = 0, section: str = "sample") -> Levels:
        """The levels by the spacing of a section of the config; 0 for as many as the schedule has.

        Raises:
          ConfigError: if the config's spacing has no such levels.
        """
        workdir, step = self.workdir, self.step
        return make_levels(self.config, self.definition, num_timesteps, workdir, step, section)

    def with_variance(self, name: str) -> "Run":
        """The same run with another Σ_θ.

        Args:
          name: a key of VARIANCES or one of `analytic.ANALYTIC`; empty for the model's own.

        Raises:
          ConfigError: unless it is one of `analytic.available_variances`.
        """
        if not name:
            return self
        available = analytic.available_variances(self.config)
        if name not in available:
            if name in VARIANCES:
                raise ConfigError(
                    f"variance = {name!r} is learned, and this network was not trained with it; "
                    f"use {', '.join(available)}"
                )
            raise ConfigError(f"variance = {name!r}{unknown(name, available)}")
        if name in VARIANCES:
            variance = VARIANCES[name]()
        else:
            variance = analytic.variance_of_errors(name, *self.measured_errors())
        return self._replace(definition=self.definition._replace(variance=variance))

    def measured_errors(self) -> tuple[Float[np.ndarray, "L"], Float[np.ndarray, "L *d"]]:
        """E[(ε − ε̂)²] of every coordinate on training data, as `analytic.measure_errors` has it.

        Read from eps_errors.npz where that holds the errors of these weights and settings. Else
        measured, and saved there unless the run does not write.
        """
        path = self.workdir / analytic.ERRORS_FILE
        identity = provenance.identity(
            analytic.ERRORS_FILE, self.config, self.step, data=splits.fingerprints(self.config)
        )
        shape = self.definition.image_shape

        def parse(saved):
            if not provenance.is_current(path, saved, identity, self.writes):
                return None
            log_snr, error = saved["log_snr"], saved["error"]
            require_shape("log_snr", log_snr, (log_snr.size,))
            return log_snr, require_shape("error", error, (log_snr.size, *shape))

        if (saved := read(path, parse)) is not None:
            return saved
        log_snr, error = analytic.measure_errors(self.config, self.definition, self.params)
        if self.writes:
            arrays = {"log_snr": log_snr, "error": error, "step": self.step}
            write_npz(path, **arrays, identity=json.dumps(identity))
        return log_snr, error


def load(
    config: ConfigDict,
    workdir: epath.PathLike,
    checkpoint: str = "best",
    writes: bool = True,
    uses_data: bool = True,
) -> Run:
    """Loads the EMA weights of a work directory.

    Args:
      config: the config; its model must be the trained one.
      workdir: holds the checkpoints.
      checkpoint: "best" or "latest", as for `load_ema`.
      writes: whether results will be written to the directory.
      uses_data: whether to check that the run was trained on the present training data. If they
        were replaced, the network may have been trained on examples that are held out now.

    Raises:
      ConfigError: if the directory holds no such model, or one of other training data, or results
        can't be written to it.
    """
    record.check_network(config, workdir)
    definition = define_model(config)
    if uses_data:
        data = splits.describe_data(config, "train").summary()
        record.check_data(config, workdir, record.DataSummary(*data))
    params, step = load_ema(workdir, checkpoint, abstract_params(definition))
    if writes:
        record.check_writable(workdir)
    return Run(config, epath.Path(workdir), definition.learned(params), params, step, writes)


def load_ema(
    workdir: epath.PathLike, which: str, like: Any, setting: str = "workdir"
) -> tuple[Any, int]:
    """The EMA weights of a work directory and their training step; changes nothing there.

    Args:
      workdir: a work directory, also one that is still training.
      which: "best" (lowest bound on validation; the latest where none was measured) or "latest".
        A damaged checkpoint is reported, and the next one taken.
      like: the parameters' shapes and dtypes.
      setting: the setting that gave `workdir`, for error messages.

    Raises:
      ConfigError: for a directory without an intact checkpoint, or of another architecture.
    """
    with Checkpoints(workdir, read_only=True, setting=setting) as checkpoints:

        def read(step: int) -> tuple[Any, int]:
            return checkpoints.restore(step, like, "ema_params"), step

        if jax.process_count() > 1:  # the processes must agree, so the first one chooses
            chosen = checkpoints.choose(which) if distributed.is_first() else None
            step = distributed.broadcast_first(-1 if chosen is None else chosen)
            restored = None if step < 0 else read(step)
        else:
            restored = _first_good(checkpoints, which, read)
    if restored is None:
        raise ConfigError(f"{setting}={workdir} holds no checkpoint that is not damaged")
    return restored


def _first_good(checkpoints: Checkpoints, which: str, read: Any) -> tuple[Any, int] | None:
    """`Checkpoints.first_good`, again where training removed the checkpoint that was chosen."""
    for attempt in range(_ATTEMPTS):
        try:
            return checkpoints.first_good(which, read)
        except RemovedError:
            if attempt == _ATTEMPTS - 1:
                raise
    return None


def make_levels(
    config: ConfigDict,
    definition: ModelDefinition,
    num_timesteps: int,
    workdir: epath.PathLike,
    step: int,
    section: str = "sample",
) -> Levels:
    """The levels that a sampler steps through, by the config's spacing.

    Args:
      config: has the spacing, and its options in `sample`.
      definition: has the schedule, a learned one tabulated.
      num_timesteps: number of levels; 0 for as many as the schedule has.
      workdir: holds the bound-optimal levels, if the spacing is that.
      step: the training step of the weights.
      section: of the config, whose `spacing` is used.

    Raises:
      ConfigError: if there are no such levels.
    """
    name, num_timesteps = config[section].spacing, num_timesteps or definition.levels.num_timesteps
    if name == "bound_optimal":
        return optimal_levels(workdir, num_timesteps, step, definition.schedule, section)
    try:
        return SPACINGS[name](definition.schedule, num_timesteps, **config.sample.get(name, {}))
    except ValueError as error:
        raise ConfigError(f"config.{section}.spacing = {name!r}: {error}") from error
