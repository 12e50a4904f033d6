"""Σ_θ, the variance of the reverse step: fixed, learned, or worked out from measured errors.

A Σ_θ is told by r = log(Σ_θ/β̃), which is what the KL needs. Given x_t the best Σ_θ for a mean S_θ
is β̃ + E‖μ̃ − S_θ‖²/d = β̃ (1 + expm1(gap) e), where e = E[(ε − ε̂)²] is the mean squared error of a
coordinate at that noise level. The error does not depend on where the step goes, so a Σ_θ that is
told by its errors serves any number of timesteps and any schedule.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion.schedules import Array, Step

Extra = Float[Array, "b *d"] | None
"""What a network with a learned Σ_θ says beside its prediction; None where it says nothing."""


class Variance(NamedTuple):
    """A choice of Σ_θ. Both functions take a `Step` and `Extra` that broadcast to each other.

    Attributes:
      of: -> Σ_θ; also at s = 0, where it is the variance of x_0 given x_t.
      log_ratio: -> r = log(Σ_θ/β̃) for s ≥ 1, formed without cancellation.
      is_learned: whether it needs the `Extra`.
    """

    of: Callable[[Step, Extra], Float[Array, "..."]]
    log_ratio: Callable[[Step, Extra], Float[Array, "..."]]
    is_learned: bool = False


def beta_tilde() -> Variance:
    """Σ = β̃_t, the posterior's own (13.20): the right one for data that are a single point."""
    return Variance(
        of=lambda step, extra=None: step.posterior_variance,
        log_ratio=lambda step, extra=None: jnp.zeros_like(step.gap),
    )


def beta() -> Variance:
    """Σ = β_t: the right one for data that are standard normal. Ho et al. (2020), section 3.2."""
    return Variance(
        of=lambda step, extra=None: step.beta,
        log_ratio=lambda step, extra=None: step.log_beta_ratio,
    )


def learned_range() -> Variance:
    """log Σ between log β̃ and log β, each coordinate at its place ½(1 + extra).

    Nichol and Dhariwal (2021), equation 15.
    """

    def log_ratio(step, extra):
        return 0.5 * (1 + extra) * step.log_beta_ratio

    def of(step, extra):
        # At s = 0 the range has no lower end, and β is what is left of it.
        inner = Step(step.log_snr, jnp.where(jnp.isinf(step.gap), 1.0, step.gap))
        below_beta = jnp.exp(-0.5 * (1 - extra) * inner.log_beta_ratio)
        return step.beta * jnp.where(jnp.isinf(step.gap), 1.0, below_beta)

    return Variance(of, log_ratio, is_learned=True)


def learned_diagonal() -> Variance:
    """A free diagonal: the network's `extra` is the log of the error e of each coordinate.

    Whatever the extra says Σ exceeds β̃, as the best Σ does.
    """
    return _of_error(lambda log_snr, extra: jnp.exp(extra), is_learned=True)


def of_measured_error(
    log_snr: Float[np.ndarray, "n"], error: Float[np.ndarray, "n *#d"]
) -> Variance:
    """The best Σ_θ for a mean whose errors have been measured, with no training.

    Isotropic with one error a level, diagonal with one for each coordinate: Bao et al. (2022),
    Analytic-DPM, theorem 1, and its extension to coordinates. Between levels log e is linear in λ;
    outside them it is constant.

    Args:
      log_snr: the levels measured, falling.
      error: e = E[(ε − ε̂)²] there; [n], or [n, …] with the shape of an example.

    Raises:
      ValueError: if the log-SNRs do not fall, or an error is not positive.
    """
    log_snr, error = np.asarray(log_snr, np.float64), np.asarray(error, np.float64)
    if np.any(np.diff(log_snr) >= 0):
        raise ValueError("log_snr must fall from level to level")
    if not np.all(error > 0):
        raise ValueError(f"an error must be positive; the least is {error.min()}")
    rising, log_error = jnp.asarray(log_snr[::-1].copy()), jnp.asarray(np.log(error[::-1]))

    def error_at(at, extra):
        del extra
        levels = jnp.reshape(at, jnp.shape(at)[:1])
        place = jnp.interp(levels, rising, jnp.arange(len(rising), dtype=rising.dtype))
        below = jnp.clip(jnp.floor(place).astype(int), 0, max(len(rising) - 2, 0))
        above = jnp.minimum(below + 1, len(rising) - 1)
        # One axis for the example, and one for each of its dimensions.
        shape = jnp.shape(at)[:1] + jnp.broadcast_shapes(jnp.shape(at)[1:], log_error.shape[1:])
        weight = jnp.reshape(place - below, jnp.shape(levels) + (1,) * (log_error.ndim - 1))
        value = (1 - weight) * log_error[below] + weight * log_error[above]
        value = jnp.reshape(value, value.shape + (1,) * (len(shape) - value.ndim))
        return jnp.exp(value)

    return _of_error(error_at, is_learned=False)


def _of_error(error: Callable, is_learned: bool) -> Variance:
    """Σ = β̃ (1 + expm1(gap) e) with e = error(λ_t, extra)."""

    def log_ratio(step, extra=None):
        return jnp.log1p(jnp.expm1(step.gap) * error(step.log_snr, extra))

    def of(step, extra=None):
        # β̃ expm1(gap) = c² ᾱ_s/SNR_t; at s = 0 that leaves e/SNR_t, the error of x̂_0.
        of_error = step.c**2 * jax.nn.sigmoid(step.log_snr_s) * jnp.exp(-step.log_snr)
        return step.posterior_variance + of_error * error(step.log_snr, extra)

    return Variance(of, log_ratio, is_learned)


VARIANCES: dict[str, Callable[[], Variance]] = {
    "beta_tilde": beta_tilde,
    "beta": beta,
    "learned_range": learned_range,
    "learned_diagonal": learned_diagonal,
}
