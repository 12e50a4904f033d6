"""Training of a noise schedule: its ends by the continuous-time bound, its interior for variance.

With λ(u), u ∈ [0, 1], a sample of the diffusion term is L = −λ'(u) e, where e = ½‖ε − ε̂‖² at λ(u).
By a change of variables its mean is ∫ E[e | λ] dλ from λ(1) to λ(0): the bound depends on the
schedule through its two ends only, and trains them. The interior can minimise the variance of L
instead, by `variance_surrogate`. Lecture 13, (13.11–13.13); Kingma et al. (2021), sections 5.1 and
I.2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion.schedules import Array, Numbers, floats

ScheduleFn = Callable[[Float[Array, "b"]], Float[Array, "b"]]
"""Times in [0, 1] -> log-SNRs, elementwise."""


def value_and_slope(
    schedule_fn: ScheduleFn, time: Numbers
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """λ and dλ/du at times u; the slope is negative."""
    time = floats(time)
    return jax.jvp(schedule_fn, (time,), (jnp.ones_like(time),))


def diffusion_term(slope: Float[Array, "b"], half_error: Float[Array, "b"]) -> Float[Array, "b"]:
    """−λ'(u) ½‖ε − ε̂‖² in nats, whose mean over uniform u is the continuous-time diffusion term.

    The mean does not depend on the interior of the schedule, so the gradient with respect to the
    interior is noise: stop it, as `NoiseSchedule.ends_only` does.

    Args:
      slope: λ'(u).
      half_error: ½‖ε − ε̂‖² at λ(u), the sum over dimensions.

    Kingma et al. (2021), equation 17.
    """
    return -slope * half_error


def variance_surrogate(
    schedule_fn: ScheduleFn, time: Float[Array, "b"], half_error: Float[Array, "b"]
) -> Float[Array, "b"]:
    """L²/(mean L)² of each sample; its gradient is that of the relative variance of L.

    With h(λ) = E[e² | λ] the mean of L² is F = ∫ h λ'² du = ∫ h(λ) |λ'| dλ. With fixed ends F
    depends on the schedule only through |λ'| as a function of λ, so its gradient has no derivative
    of the denoiser. Let dλ(u) and dλ'(u) be the changes at fixed u. By the implicit function
    theorem the time with a fixed λ changes by du = −dλ(u)/λ', so at fixed λ the slope changes by
    dλ'(u) − (λ''/λ') dλ(u), and

      dF = ∫ h(λ) λ' [dλ'(u) − (λ''/λ') dλ(u)] du = E[e² (λ' dλ'(u) − λ'' dλ(u))].

    The minimum of F is (∫ √h dλ)², at |λ'| ∝ 1/√h: each noise level has time in proportion to √h.

    The squared mean of the batch is a constant divisor, so that the learning rate does not depend
    on the scale of the data. It biases the gradient by a relative O(1/b).

    Args:
      schedule_fn: the schedule with fixed ends (`NoiseSchedule.interior_only`). The gradient is
        wrong for parameters that move an end.
      time: independent or stratified draws, each uniform on [0, 1].
      half_error: ½‖ε − ε̂‖² at these times, the sum over dimensions; treated as a constant.

    Returns:
      One number for each sample; its mean is one plus the relative variance of L over u, data and
      noise.
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
