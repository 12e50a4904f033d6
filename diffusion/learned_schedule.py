"""Training a noise schedule: what the continuous-time bound asks of it, and what it leaves free.

With λ(u), u ∈ [0, 1], one draw of the diffusion term is L = −λ'(u) e, where e = ½‖ε − ε̂‖² at
λ(u). A change of variables makes its mean ∫ E[e | λ] dλ from λ(1) to λ(0): the bound depends on the
two ends alone, so they belong to the bound. The interior is free to lower the variance of L, and
`variance_surrogate` trains it for that. Lecture 13, (13.11–13.13); Kingma et al. (2021), sections
5.1 and I.2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion.schedules import Array

ScheduleFn = Callable[[Float[Array, "b"]], Float[Array, "b"]]
"""From times in [0, 1] to log-SNRs, each from its own time alone."""


def value_and_slope(
    schedule_fn: ScheduleFn, time: Float[Array, "b"]
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """λ and dλ/du at times u; the slope is negative."""
    time = jnp.asarray(time)
    return jax.jvp(schedule_fn, (time,), (jnp.ones_like(time),))


def diffusion_term(slope: Float[Array, "b"], half_error: Float[Array, "b"]) -> Float[Array, "b"]:
    """−λ'(u) ½‖ε − ε̂‖² in nats, whose mean over uniform u is the continuous-time diffusion term.

    Differentiated through λ(u) and λ'(u) it reaches the whole schedule. Its mean does not depend on
    the interior, so that part of its gradient is noise: stop it, as `NoiseSchedule.ends_only` does.

    Args:
      slope: λ'(u).
      half_error: ½‖ε − ε̂‖² at λ(u), summed over dimensions.

    Kingma et al. (2021), equation 17.
    """
    return -slope * half_error


def variance_surrogate(
    schedule_fn: ScheduleFn, time: Float[Array, "b"], half_error: Float[Array, "b"]
) -> Float[Array, "b"]:
    """L²/(mean L)² of each draw, with the gradient of the relative variance of L in the schedule.

    With h(λ) = E[e² | λ] the mean of L² is F = ∫ h λ'² du = ∫ h(λ) |λ'| dλ. Between fixed ends it
    depends on the schedule through |λ'| as a function of λ only, and so does its gradient, with no
    derivative of the denoiser. By the implicit function theorem the time that keeps λ moves by
    du = −dλ(u)/λ', so at fixed λ the slope changes by dλ'(u) − (λ''/λ') dλ(u), and

      dF = ∫ h(λ) λ' [dλ'(u) − (λ''/λ') dλ(u)] du = E[e² (λ' dλ'(u) − λ'' dλ(u))],

    where dλ(u) and dλ'(u) are the changes at fixed u. F is least, and equal to (∫ √h dλ)², where
    |λ'| ∝ 1/√h: every noise level then gets time in proportion to √h.

    The division by the squared mean of the batch, held constant, makes a learning rate independent
    of the data's scale. It biases the gradient by a part of order 1/b.

    Args:
      schedule_fn: the schedule, its ends held fixed (`NoiseSchedule.interior_only`). The gradient
        is wrong for a parameter that moves an end.
      time: independent or stratified draws, each uniform on [0, 1].
      half_error: ½‖ε − ε̂‖² at those times, summed over dimensions. No gradient enters it.

    Returns:
      One number a draw; the mean is one plus the relative variance of L over u, data and noise.
    """

    def slope_fn(time):
        return value_and_slope(schedule_fn, time)[1]

    log_snr = schedule_fn(time)
    slope, curvature = value_and_slope(slope_fn, time)
    fixed_slope = jax.lax.stop_gradient(slope)
    mean = jnp.mean(diffusion_term(fixed_slope, half_error))
    scale = jax.lax.stop_gradient(half_error / jnp.where(mean > 0, mean, 1.0))
    at_fixed_log_snr = jax.lax.stop_gradient(curvature) * (log_snr - jax.lax.stop_gradient(log_snr))
    return scale**2 * (fixed_slope * slope - at_fixed_log_snr)
