"""The choice of K noise levels, for a bound or a sampler, between the two ends of a schedule.

SPACINGS has the spacings given by a rule. The optimal levels for a bound follow from the costs of
steps: the KL of a step depends on its two levels only, so the bound is the length of a path, and
dynamic programming finds the shortest path of K levels. Watson et al. (2021), "Learning to
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
      ValueError: if num_timesteps is less than one.
    """
    return schedule.levels(num_timesteps)


def quadratic(schedule: Schedule, num_timesteps: int) -> Levels:
    """At the times (i/(K − 1))², denser near the data. Song et al. (2021), DDIM, appendix D.2.

    Raises:
      ValueError: as for `uniform`.
    """

    def at(fraction):
        knots = schedule.knots
        return np.interp(fraction**2, np.linspace(0.0, 1.0, len(knots)), knots)

    return _between_ends(schedule, num_timesteps, at)


def log_snr(schedule: Schedule, num_timesteps: int) -> Levels:
    """Equally spaced in λ, for any schedule. Lu et al. (2022), DPM-Solver, section 3.4.

    Raises:
      ValueError: as for `uniform`.
    """
    first, last = schedule.knots[0], schedule.knots[-1]
    return _between_ends(schedule, num_timesteps, lambda f: first + f * (last - first))


def karras(schedule: Schedule, num_timesteps: int, rho: float = 7.0) -> Levels:
    """Equally spaced in (σ/α)^{1/ρ}; a larger ρ is denser near the data, and ρ → ∞ is `log_snr`.

    Karras et al. (2022), equation 5.

    Raises:
      ValueError: as for `uniform`; if ρ is not positive, or so small that levels overflow or are
        equal in float32.
    """
    if not rho > 0:
        raise ValueError(f"rho = {rho:g}; it must be positive")
    first, last = schedule.knots[0], schedule.knots[-1]
    # (σ/α)^{1/ρ} = e^{−λ/2ρ}; divided by its value at the cleanest level it is 1 + f expm1(…).
    with np.errstate(over="ignore"):
        growth = np.expm1((first - last) / (2 * rho))
    levels = _between_ends(
        schedule, num_timesteps, lambda f: first - 2 * rho * np.log1p(f * growth)
    )
    ties = np.flatnonzero(np.diff(np.float32(levels.log_snr)) == 0)
    if ties.size:
        raise ValueError(
            f"rho = {rho:g} with num_timesteps = {num_timesteps}; levels from t = {ties[0]} on are "
            "equal in float32: take a larger rho or fewer levels"
        )
    return levels


def _between_ends(
    schedule: Schedule, num_timesteps: int, log_snr: Callable[[np.ndarray], np.ndarray]
) -> Levels:
    """K levels at λ(i/(K − 1)), with the schedule's exact ends; for K = 1 the noisiest level."""
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
    """The expected KL of a step from each level t to each cleaner level s, from mean errors.

    If Σ_θ does not depend on x_t, the KL is linear in (ε − ε̂)², and the mean error determines the
    mean KL. With Σ_θ = β̃ it is ½ expm1(λ_s − λ_t) E‖ε − ε̂‖². Time is O(N² d), memory O(N d).

    Args:
      log_snr: λ of the candidate levels, decreasing.
      error: E[(ε − ε̂)²] of each coordinate at these levels.
      variance: Σ_θ; a learned one is refused, because it depends on x_t.

    Returns:
      cost[s, t] in nats and float64; +∞ if s ≥ t or if the gap overflows.

    Raises:
      ValueError: for a learned Σ_θ, or if the log-SNRs do not decrease.
    """
    if variance.is_learned:
        raise ValueError("mean errors do not determine the mean KL of a learned variance")
    log_snr = np.asarray(log_snr, np.float64)
    if np.any(np.diff(log_snr) >= 0):
        raise ValueError("log_snr must decrease from level to level")

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
        cost = np.asarray(costs(log_snr, np.asarray(error, np.float64)))
    return np.where(np.isnan(cost), np.inf, cost)


def bound_optimal(
    cost: Float[np.ndarray, "N N"], num_timesteps: int
) -> dict[int, Int[np.ndarray, "_"]]:
    """The levels with the smallest total cost, for each number of levels up to K, in O(K N²).

    Args:
      cost: cost[s, t] of a step from candidate t to candidate s < t, from `pair_costs`; other
        entries are ignored.
      num_timesteps: K ≤ N.

    Returns:
      The indices of the levels, by number of levels. They increase and include both ends; a single
      level is the noisiest. If several choices have the same cost, one of them is returned.

    Raises:
      ValueError: if K is not in 1 … N, or a cost is NaN.
    """
    num_levels = len(cost)
    if not 1 <= num_timesteps <= num_levels:
        raise ValueError(f"num_timesteps = {num_timesteps}; choose from 1 to {num_levels} levels")
    # Indexed by (t, s), so that the search over s is contiguous in memory.
    allowed = np.tri(num_levels, k=-1, dtype=bool)
    cost = np.where(allowed, np.asarray(cost, np.float64).T, np.inf)
    if np.isnan(cost).any():
        raise ValueError("a cost is NaN")
    least = np.where(np.arange(num_levels) == 0, 0.0, np.inf)  # cost of the best path from 0 to t
    paths, before = {1: np.array([num_levels - 1])}, []
    for steps in range(1, num_timesteps):
        # The level before t on a path of `steps` steps is s ≥ steps − 1. If all these cost +∞, the
        # first is taken, so that the levels of the path are distinct.
        sums = cost[:, steps - 1 :] + least[steps - 1 :]
        before.append(sums.argmin(axis=1) + steps - 1)
        least = np.take_along_axis(sums, before[-1][:, None] - steps + 1, axis=1)[:, 0]
        path = [num_levels - 1]
        for previous in reversed(before):
            path.append(int(previous[path[-1]]))
        paths[steps + 1] = np.array(path[::-1])
    return paths
