"""Σ_θ, the variance of the reverse step: fixed, learned, or computed from measured errors.

The KL depends on Σ_θ through r = log(Σ_θ/β̃). If p_θ has the mean S_θ and q(x_s | x_t, x_0)
has the mean μ̃, the optimal Σ_θ is β̃ + E‖μ̃ − S_θ‖²/d = β̃ (1 + expm1(gap) e), where
e = E[(ε − ε̂)²] is the mean squared error of a coordinate at that noise level. The error does not
depend on the level that the step goes to, so a Σ_θ computed from errors applies to any number of
timesteps and any schedule.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion.schedules import Array, Step

Extra = Float[Array, "b *d"] | None
"""The second output of a network with a learned Σ_θ; None for other networks."""


class Variance(NamedTuple):
    """A choice of Σ_θ. Both functions take (step, extra), whose shapes broadcast.

    Attributes:
      value: -> Σ_θ; finite at s = 0 too, where the gap is infinite.
      log_ratio: -> r = log(Σ_θ/β̃) for s ≥ 1, computed without cancellation.
      is_learned: whether both functions need the `Extra`.
    """

    value: Callable[[Step, Extra], Float[Array, "..."]]
    log_ratio: Callable[[Step, Extra], Float[Array, "..."]]
    is_learned: bool = False


def beta_tilde() -> Variance:
    """Σ = β̃_t, the variance of q(x_s | x_t, x_0) (13.20): optimal for data at a single point."""
    return Variance(
        value=lambda step, extra=None: step.posterior_variance,
        log_ratio=lambda step, extra=None: jnp.zeros_like(step.gap),
    )


def beta() -> Variance:
    """Σ = β_t: optimal for standard normal data. Ho et al. (2020), section 3.2."""
    return Variance(
        value=lambda step, extra=None: step.beta,
        log_ratio=lambda step, extra=None: step.log_beta_ratio,
    )


def learned_range() -> Variance:
    """log Σ interpolates between log β̃ and log β, with weight ½(1 + extra) in each coordinate.

    Nichol and Dhariwal (2021), equation 15.
    """

    def log_ratio(step, extra):
        return 0.5 * (1 + extra) * step.log_beta_ratio

    def value(step, extra):
        # At s = 0 the range has no lower end: Σ is its upper end, β.
        inner = Step(step.log_snr, jnp.where(jnp.isinf(step.gap), 1.0, step.gap))
        below_beta = jnp.exp(-0.5 * (1 - extra) * inner.log_beta_ratio)
        return step.beta * jnp.where(jnp.isinf(step.gap), 1.0, below_beta)

    return Variance(value, log_ratio, is_learned=True)


def learned_diagonal() -> Variance:
    """A free diagonal: the network's `extra` is the log of the error e of each coordinate.

    Σ exceeds β̃ for every value of the extra, as the optimal Σ does.
    """
    return _from_error(lambda log_snr, extra: jnp.exp(extra), is_learned=True)


def from_measured_error(
    log_snr: Float[np.ndarray, "n"], error: Float[np.ndarray, "n *#d"]
) -> Variance:
    """The optimal Σ_θ of a model whose errors have been measured, without training.

    It is isotropic if there is one error for each level, diagonal if there is one for each level
    and coordinate. Between levels log e is linear in λ; outside their range it is constant. Bao et
    al. (2022), Analytic-DPM, theorem 1, and its extension to coordinates.

    Args:
      log_snr: the log-SNRs of the measured levels, strictly decreasing.
      error: e = E[(ε − ε̂)²] at these levels; [n], or [n, …] with the shape of an example.

    Raises:
      ValueError: if the log-SNRs do not decrease, or an error is not positive.
    """
    log_snr, error = np.asarray(log_snr, np.float64), np.asarray(error, np.float64)
    if np.any(np.diff(log_snr) >= 0):
        raise ValueError("log_snr must decrease from level to level")
    if not np.all(error > 0):
        raise ValueError(f"errors must be positive; the smallest is {error.min()}")
    rising, log_error = jnp.asarray(log_snr[::-1].copy()), jnp.asarray(np.log(error[::-1]))

    def error_at(log_snr, extra):
        del extra
        levels = jnp.reshape(log_snr, jnp.shape(log_snr)[:1])
        place = jnp.interp(levels, rising, jnp.arange(len(rising), dtype=rising.dtype))
        below = jnp.clip(jnp.floor(place).astype(int), 0, max(len(rising) - 2, 0))
        above = jnp.minimum(below + 1, len(rising) - 1)
        # One axis for the example, and one for each of its dimensions.
        dims = jnp.broadcast_shapes(jnp.shape(log_snr)[1:], log_error.shape[1:])
        weight = jnp.reshape(place - below, jnp.shape(levels) + (1,) * (log_error.ndim - 1))
        value = (1 - weight) * log_error[below] + weight * log_error[above]
        value = jnp.reshape(value, value.shape + (1,) * (1 + len(dims) - value.ndim))
        return jnp.exp(value)

    return _from_error(error_at, is_learned=False)


def _from_error(error: Callable, is_learned: bool) -> Variance:
    """Σ = β̃ (1 + expm1(gap) e) with e = error(λ_t, extra)."""

    def log_ratio(step, extra=None):
        return jnp.log1p(jnp.expm1(step.gap) * error(step.log_snr, extra))

    def value(step, extra=None):
        # β̃ expm1(gap) = c² ᾱ_s/SNR_t. At s = 0 this times e is e/SNR_t, the error of x̂_0.
        weight = step.c**2 * jax.nn.sigmoid(step.log_snr_s) * jnp.exp(-step.log_snr)
        return step.posterior_variance + weight * error(step.log_snr, extra)

    return Variance(value, log_ratio, is_learned)


VARIANCES: dict[str, Callable[[], Variance]] = {
    "beta_tilde": beta_tilde,
    "beta": beta,
    "learned_range": learned_range,
    "learned_diagonal": learned_diagonal,
}
