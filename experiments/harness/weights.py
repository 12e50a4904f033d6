"""The averaged weights of a work directory, to evaluate or to sample from."""

from typing import Any

import jax
from etils import epath

from experiments.harness import devices
from experiments.harness.checkpoints import Checkpoints, RemovedError
from experiments.harness.errors import ConfigError

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
            chosen = checkpoints.choose(which) if devices.is_first() else None
            step = devices.of_first(-1 if chosen is None else chosen)
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
