"""The K noise levels whose bound is the lowest for one network, found once and kept in a file."""

import json

import numpy as np
from etils import epath
from jaxtyping import Float

from diffusion.schedules import Levels, Schedule
from diffusion.spacing import bound_optimal, pair_costs
from diffusion.variances import Variance
from experiments.harness.errors import ConfigError
from experiments.harness.workdir.provenance import OPTIMAL_LEVELS

FILE = OPTIMAL_LEVELS


def find(
    candidates: Levels,
    log_snr: Float[np.ndarray, "L"],
    error: Float[np.ndarray, "L *d"],
    variance: Variance,
    num_timesteps: tuple[int, ...],
) -> dict[int, Levels]:
    """Of the candidates the levels with the least expected KL in sum, for each number of levels.

    Both ends are taken, so that the prior is the same for all, and so is the reconstruction unless
    the decoder's variance is β̃_2, whose part is not counted.

    Args:
      candidates: the levels to choose from.
      log_snr: the levels at which the errors were measured, falling.
      error: E[(ε − ε̂)²] of every coordinate there; between them its logarithm is linear in λ.
      variance: Σ_θ; not a learned one.
      num_timesteps: how many levels to choose.
    """
    at = candidates.log_snr[1:]
    # An error of zero, at a pixel that is the same in every image, has no logarithm.
    log_error = np.log(np.maximum(error, np.finfo(np.float32).tiny))
    log_error = np.apply_along_axis(lambda e: np.interp(-at, -log_snr, e), 0, log_error)
    found = bound_optimal(pair_costs(at, np.exp(log_error), variance), max(num_timesteps))
    return {n: Levels.from_log_snr(at[found[n]]) for n in num_timesteps}


def to_json(optimal: dict[int, Levels]) -> dict[str, list[float]]:
    """The log-SNRs by number of levels, as `optimal_levels` reads them back to the last bit."""
    return {str(n): levels.log_snr[1:].tolist() for n, levels in optimal.items()}


def optimal_levels(
    workdir: epath.PathLike, num_timesteps: int, step: int, schedule: Schedule
) -> Levels:
    """The K levels with the lowest bound that --experiment=spacing found here.

    Args:
      workdir: holds spacing.json.
      num_timesteps: K.
      step: the checkpoint's step, whose levels they must be.
      schedule: whose ends theirs must be.

    Raises:
      ConfigError: if there are none, or they are of another step, schedule or K.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        raise ConfigError(_remedy(workdir, num_timesteps, f"there is no {path}"))
    found = json.loads(path.read_text())
    if found["step"] != step:
        wrong = f"{path} is of step {found['step']}, and the checkpoint of step {step}"
        raise ConfigError(_remedy(workdir, num_timesteps, wrong))
    if str(num_timesteps) not in found["log_snr"]:
        wrong = f"{path} holds {', '.join(found['log_snr'])} levels, and not {num_timesteps}"
        raise ConfigError(_remedy(workdir, num_timesteps, wrong))
    log_snr = np.array(found["log_snr"][str(num_timesteps)])
    # A learned schedule's ends come from a network, which rounds.
    if not np.allclose(log_snr[[0, -1]], schedule.knots[[0, -1]], rtol=1e-5):
        wrong = f"{path} is of another schedule, from λ = {log_snr[0]:g} to {log_snr[-1]:g}"
        raise ConfigError(_remedy(workdir, num_timesteps, wrong))
    return Levels.from_log_snr(log_snr)


def _remedy(workdir: epath.PathLike, num_timesteps: int, wrong: str) -> str:
    return (
        f"config.sample.spacing = 'bound_optimal': {wrong}; run first python main.py "
        f"--experiment=spacing --workdir={workdir} "
        f"'--config.spacing.num_timesteps=({num_timesteps},)'"
    )
