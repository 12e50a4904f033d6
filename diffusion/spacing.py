"""Which K noise levels to step through, in a bound or in a sampler, between a schedule's two ends.

The spacings by a rule are in `SPACINGS`. The best levels for a bound are found from its costs: the
KL of a step depends on its two levels alone, so that the bound is the length of a path, and the
shortest path of K levels is found by dynamic programming. Watson et al. (2021), "Learning to
efficiently sample from diffusion probabilistic models".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from diffusion.bound import kl_from_error
from diffusion.gaussian import expand
from diffusion.schedules import Levels, Schedule, Step
from diffusion.variances import Variance


def uniform(schedule: Schedule, num_timesteps: int) -> Levels:
    """Equally spaced in the schedule's time: `Schedule.levels`.

    Raises:
      ValueError: if the schedule has no so many levels.
    """
    return schedule.levels(num_timesteps)


def quadratic(schedule: Schedule, num_timesteps: int) -> Levels:
    """Times (i/(K − 1))², denser near the data. Song et al. (2021), DDIM, appendix D.2.

    Raises:
      ValueError: as for `uniform`.
    """

    def at(fraction):
        knots = schedule.knots
        return np.interp(fraction**2, np.linspace(0.0, 1.0, len(knots)), knots)

    return _between_ends(schedule, num_timesteps, at)


def log_snr(schedule: Schedule, num_timesteps: int) -> Levels:
    """Equally spaced in λ, whatever the schedule's time. Lu et al. (2022), DPM-Solver, section 3.4.

    Raises:
      ValueError: as for `uniform`.
    """
    first, last = schedule.knots[0], schedule.knots[-1]
    return _between_ends(schedule, num_timesteps, lambda f: first + f * (last - first))


def karras(schedule: Schedule, num_timesteps: int, rho: float = 7.0) -> Levels:
    """(σ/α)^{1/ρ} equally spaced: the larger ρ, the denser near the data.

    Karras et al. (2022), equation 5. ρ → ∞ is `log_snr`.

    Raises:
      ValueError: as for `uniform`, or if ρ is not positive, or so small that levels overflow.
    """
    if not rho > 0:
        raise ValueError(f"rho = {rho:g}; it must be positive")
    first, last = schedule.knots[0], schedule.knots[-1]
    # (σ/α)^{1/ρ} is e^{−λ/2ρ}; relative to the cleanest level it is 1 + f expm1(…).
    with np.errstate(over="ignore"):
        growth = np.expm1((first - last) / (2 * rho))
    return _between_ends(schedule, num_timesteps, lambda f: first - 2 * rho * np.log1p(f * growth))


def _between_ends(
    schedule: Schedule, num_timesteps: int, log_snr: Callable[[np.ndarray], np.ndarray]
) -> Levels:
    """K levels at λ(i/(K − 1)), the schedule's own ends to the last bit; the noisiest alone."""
    if num_timesteps < 2:
        return schedule.levels(num_timesteps)
    inner = log_snr(np.arange(1, num_timesteps - 1) / (num_timesteps - 1))
    return Levels.from_log_snr(np.concatenate([schedule.knots[:1], inner, schedule.knots[-1:]]))


SPACINGS: dict[str, Callable[..., Levels]] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "log_snr": log_snr,
    "karras": karras,
}


def pair_costs(
    log_snr: Float[np.ndarray, "N"], error: Float[np.ndarray, "N *d"], variance: Variance
) -> Float[np.ndarray, "N N"]:
    """The expected KL of a step from any level t to any cleaner level s, from mean errors.

    The KL is linear in (ε − ε̂)² unless Σ_θ depends on x_t, so the mean error has the mean KL. At
    Σ_θ = β̃ it is ½ expm1(λ_s − λ_t) E‖ε − ε̂‖². Work and memory are N² d and N d.

    Args:
      log_snr: λ of the candidate levels, falling.
      error: E[(ε − ε̂)²] of every coordinate there.
      variance: Σ_θ; not a learned one, which depends on x_t.

    Returns:
      cost[s, t] in nats and float64; +∞ where s ≥ t, or where the gap overflows.

    Raises:
      ValueError: for a learned Σ_θ, or unless the log-SNRs fall.
    """
    if variance.is_learned:
        raise ValueError("the mean KL of a learned variance is not told by mean errors")
    log_snr = np.asarray(log_snr, np.float64)
    if np.any(np.diff(log_snr) >= 0):
        raise ValueError("log_snr must fall from level to level")

    @jax.jit
    def costs(log_snr, error):
        def to_all(level):
            log_snr_t, error_t = (jnp.broadcast_to(a, error.shape[: a.ndim + 1]) for a in level)
            gap = log_snr - log_snr_t
            step = Step(log_snr_t, jnp.where(gap > 0, gap, 1.0))
            r = variance.log_ratio(Step(*(expand(a, error) for a in step)), None)
            return jnp.where(gap > 0, kl_from_error(error_t, step, r), jnp.inf)

        return jax.lax.map(to_all, (log_snr, error)).T

    with jax.enable_x64(True):
        found = np.asarray(costs(log_snr, np.asarray(error, np.float64)))
    return np.where(np.isnan(found), np.inf, found)


def bound_optimal(
    cost: Float[np.ndarray, "N N"], num_timesteps: int
) -> dict[int, Int[np.ndarray, "_"]]:
    """The levels whose steps cost least in sum, for every number of levels up to K, in O(K N²).

    Args:
      cost: of a step from candidate t to candidate s < t, as `pair_costs` gives it; the rest of
        the matrix is not looked at.
      num_timesteps: K ≤ N.

    Returns:
      By number of levels the indices of the levels taken, rising, both ends among them; of one
      level, the noisiest. Of several that cost the same, one.

    Raises:
      ValueError: if K is not between 1 and N, or a cost is NaN.
    """
    num_levels = len(cost)
    if not 1 <= num_timesteps <= num_levels:
        raise ValueError(f"num_timesteps = {num_timesteps}; choose from 1 to {num_levels} levels")
    # By (t, s), so that the search over s runs along memory.
    allowed = np.tri(num_levels, k=-1, dtype=bool)
    cost = np.where(allowed, np.asarray(cost, np.float64).T, np.inf)
    if np.isnan(cost).any():
        raise ValueError("a cost is NaN")
    least = np.where(np.arange(num_levels) == 0, 0.0, np.inf)  # of the paths from 0 to t
    found, before = {1: np.array([num_levels - 1])}, []
    for steps in range(1, num_timesteps):
        # A path of so many steps to t comes from an s ≥ steps − 1; where all of them cost +∞ it is
        # taken from the first, so that its levels still differ.
        sums = cost[:, steps - 1 :] + least[steps - 1 :]
        before.append(sums.argmin(axis=1) + steps - 1)
        least = np.take_along_axis(sums, before[-1][:, None] - steps + 1, axis=1)[:, 0]
        path = [num_levels - 1]
        for previous in reversed(before):
            path.append(int(previous[path[-1]]))
        found[steps + 1] = np.array(path[::-1])
    return found
