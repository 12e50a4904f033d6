"""The K noise levels with the lowest bound for a network, computed once and saved in a file."""

from typing import Any, NoReturn

import numpy as np
from etils import epath
from jaxtyping import Float

from diffusion.schedules import Levels, Schedule
from diffusion.spacing import bound_optimal, pair_costs
from diffusion.variances import Variance
from experiments.harness.errors import ConfigError
from experiments.harness.workdir.dependences import OPTIMAL_LEVELS
from experiments.harness.workdir.files import read, require_shape

FILE = OPTIMAL_LEVELS


def find(
    candidates: Levels,
    log_snr: Float[np.ndarray, "L"],
    error: Float[np.ndarray, "L *d"],
    variance: Variance,
    num_timesteps: tuple[int, ...],
) -> dict[int, Levels]:
    """The subsets of the candidates with the least expected sum of KLs, by number of levels.

    Every subset has both ends, so that all have the same prior. They also have the same
    reconstruction, unless the decoder's variance is β̃_2; the change of that term is neglected.

    Args:
      candidates: the levels to choose from.
      log_snr: the levels at which the errors were measured, falling.
      error: E[(ε − ε̂)²] of every coordinate there; its logarithm is interpolated linearly in λ.
      variance: Σ_θ, which is not learned.
      num_timesteps: the numbers of levels.
    """
    candidate = candidates.log_snr[1:]
    # A pixel that is the same in every image has error zero, and that has no logarithm.
    log_error = np.log(np.maximum(error, np.finfo(np.float32).tiny))
    log_error = np.apply_along_axis(lambda e: np.interp(-candidate, -log_snr, e), 0, log_error)
    chosen = bound_optimal(pair_costs(candidate, np.exp(log_error), variance), max(num_timesteps))
    return {n: Levels.from_log_snr(candidate[chosen[n]]) for n in num_timesteps}


def to_json(optimal: dict[int, Levels]) -> dict[str, list[float]]:
    """The log-SNRs by number of levels, as `optimal_levels` reads them back to the last bit."""
    return {str(n): levels.log_snr[1:].tolist() for n, levels in optimal.items()}


def optimal_levels(
    workdir: epath.PathLike,
    num_timesteps: int,
    step: int,
    schedule: Schedule,
    section: str = "sample",
) -> Levels:
    """The K levels with the lowest bound, as --experiment=spacing has saved them.

    Args:
      workdir: holds spacing.json.
      num_timesteps: K.
      step: the training step of the weights; the levels must belong to it.
      schedule: the schedule; the levels must have its ends.
      section: of the config, whose `spacing` asks for them.

    Raises:
      ConfigError: if the file is missing, or belongs to another step, schedule or K.
    """
    path = epath.Path(workdir) / FILE
    remedy = (
        f"run first python main.py --experiment=spacing --workdir={workdir} "
        f"'--config.spacing.num_timesteps=({num_timesteps},)'"
    )

    def refuse(wrong: str) -> NoReturn:
        raise ConfigError(f"config.{section}.spacing = 'bound_optimal': {wrong}; {remedy}")

    recorded = read(path, _parse, remedy)
    if recorded is None:
        refuse(f"there is no {path}")
    recorded_step, by_number = recorded
    if recorded_step != step:
        refuse(f"{path} is of step {recorded_step}, and the checkpoint of step {step}")
    if str(num_timesteps) not in by_number:
        refuse(f"{path} holds {', '.join(by_number)} levels, and not {num_timesteps}")
    log_snr = by_number[str(num_timesteps)]
    # The ends of a learned schedule come from a network, which rounds.
    if not np.allclose(log_snr[[0, -1]], schedule.knots[[0, -1]], rtol=1e-5):
        refuse(f"{path} is of another schedule, from λ = {log_snr[0]:g} to {log_snr[-1]:g}")
    return Levels.from_log_snr(log_snr)


def _parse(recorded: dict[str, Any]) -> tuple[int, dict[str, np.ndarray]]:
    """The training step of the weights, and the log-SNRs by number of levels."""
    log_snr = {n: np.array(values) for n, values in recorded["log_snr"].items()}
    return int(recorded["step"]), {
        n: require_shape("log_snr", values, (int(n),)) for n, values in log_snr.items()
    }
