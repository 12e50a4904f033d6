"""The averaged weights of a work directory, to evaluate or to sample from."""

from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from diffusion.schedules import Levels
from diffusion.spacing import SPACINGS
from experiments.harness.errors import ConfigError
from experiments.harness.processes import distributed
from experiments.harness.setup import analytic
from experiments.harness.setup.definition import ModelDefinition, define_model
from experiments.harness.setup.optimal_steps import optimal_levels
from experiments.harness.setup.params import abstract_params
from experiments.harness.workdir.checkpoints import Checkpoints, RemovedError
from experiments.harness.workdir.record import check_network, check_writable

_ATTEMPTS = 5  # while training goes on in the directory


def load_ema(
    workdir: epath.PathLike, which: str, like: Any, setting: str = "workdir"
) -> tuple[Any, int]:
    """The averaged weights of a work directory, and the step they are of; changes nothing there.

    Args:
      workdir: a work directory, also one that is still training.
      which: "best" (on validation; the latest where none was measured) or "latest". Of a damaged
        checkpoint it says so, and takes the next.
      like: the parameters' shapes and dtypes.
      setting: where `workdir` was given, for error messages.

    Raises:
      ConfigError: for a directory without good checkpoints, or of another architecture.
    """
    with Checkpoints(workdir, read_only=True, setting=setting) as checkpoints:
        if jax.process_count() > 1:  # while training goes on each would see others
            chosen = checkpoints.choose(which) if distributed.is_first() else None
            step = distributed.of_first(-1 if chosen is None else chosen)
            if step < 0:
                raise _none_good(setting, workdir)
            return checkpoints.restore_part(step, "ema_params", like), step

        def read(step: int) -> tuple[Any, int]:
            return checkpoints.restore_part(step, "ema_params", like), step

        for attempt in range(_ATTEMPTS):
            try:
                found = checkpoints.first_good(which, read)
            except RemovedError:
                if attempt == _ATTEMPTS - 1:
                    raise
                continue
            if found is not None:
                return found
            break
        raise _none_good(setting, workdir)


def _none_good(setting: str, workdir: epath.PathLike) -> ConfigError:
    return ConfigError(f"{setting}={workdir} holds no checkpoint that is not damaged")


def make_levels(
    config: ConfigDict,
    definition: ModelDefinition,
    num_timesteps: int,
    workdir: epath.PathLike,
    step: int,
) -> Levels:
    """The levels that samples step through, by the config's spacing.

    Args:
      config: `sample.spacing` and its options.
      definition: its schedule, if learned, the learned one.
      num_timesteps: how many; 0 for all of the schedule's.
      workdir: holds the bound-optimal levels, if these are asked for.
      step: the step that the parameters are of.

    Raises:
      ConfigError: if there are no such levels.
    """
    name, num_timesteps = config.sample.spacing, num_timesteps or definition.levels.num_timesteps
    if name == "bound_optimal":
        return optimal_levels(workdir, num_timesteps, step, definition.schedule)
    try:
        return SPACINGS[name](definition.schedule, num_timesteps, **config.sample.get(name, {}))
    except ValueError as error:
        raise ConfigError(f"config.sample.spacing = {name!r}: {error}") from error


class Trained(NamedTuple):
    """A trained model, as `sample` and its extras use it.

    Attributes:
      config: the config.
      workdir: where it was trained, and where results go.
      definition: its mathematics, with the learned schedule and the chosen Σ_θ.
      params: the EMA weights.
      step: the step that they are of.
    """

    config: ConfigDict
    workdir: epath.Path
    definition: ModelDefinition
    params: Any
    step: int

    def levels(self, num_timesteps: int) -> Levels:
        """The levels that samples step through, 0 for as many as the schedule has."""
        return make_levels(self.config, self.definition, num_timesteps, self.workdir, self.step)


def load(config: ConfigDict, workdir: epath.PathLike) -> Trained:
    """What a work directory holds, ready to sample from.

    Raises:
      ConfigError: if it holds no such model, or can't be written to.
    """
    check_network(config, workdir)
    definition = define_model(config)
    params, step = load_ema(workdir, config.sample.checkpoint, abstract_params(definition))
    definition = definition.learned(params)
    check_writable(workdir)
    setting = "config.sample.variance"
    definition = analytic.choose(
        config, config.sample.variance, setting, definition, params, step, workdir
    )
    return Trained(config, epath.Path(workdir), definition, params, step)
