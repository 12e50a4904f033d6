"""Training losses, as weightings of one error over noise levels (Kingma and Gao 2023).

With Σ_θ = β̃ the KL at t is ½ expm1(λ_{t−1} − λ_t) ‖ε − ε̂‖², in continuous time −½ dλ/dt ‖ε − ε̂‖²:
a loss is a choice of weight. An objective is a factory of `Objective`s; its arguments are its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from diffusion.bound import continuous_rate, kl_of_error, prior_kl, reconstruction
from diffusion.decoders import Decoder
from diffusion.forward import diffuse
from diffusion.gaussian import expand, sum_per_example
from diffusion.reverse import Outputs, Reverse, convert
from diffusion.schedules import Array, Levels, Step


class Loss(NamedTuple):
    """A loss at one draw of time for each example; its mean over uniform times is the loss.

    Attributes:
      term: what depends on the time drawn, and takes the weight of an importance-sampled t.
      rest: what does not.
    """

    term: Float[Array, "b"]
    rest: Float[Array, "b"]


class Objective(NamedTuple):
    """A training loss, at a timestep or in continuous time.

    Attributes:
      discrete: (reverse, decoder, x_0, eps, t, levels, condition=None) -> Loss.
      continuous: (reverse, decoder, x_0, eps, log_snr, slope, levels, condition=None) -> Loss, with
        λ and dλ/dt at the times drawn; of the levels only the first and the last are used. None if
        there is no such loss.
    """

    discrete: Callable[..., Loss]
    continuous: Callable[..., Loss] | None


def vlb() -> Objective:
    """The bound itself, in bits/dim: (13.26), or its limit as T → ∞."""
    return Objective(_discrete_vlb, _continuous_vlb)


def _discrete_vlb(
    reverse: Reverse,
    decoder: Decoder,
    x_0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    t: Int[Array, "b"],
    levels: Levels,
    condition: PyTree | None = None,
) -> Loss:
    """T times the term at t, and the prior."""
    log_snr = levels.step(t).log_snr
    outputs = reverse.outputs(diffuse(x_0, log_snr, eps), log_snr, condition)
    return _vlb_of(outputs, reverse, decoder, x_0, eps, t, levels)


def _vlb_of(
    outputs: Outputs,
    reverse: Reverse,
    decoder: Decoder,
    x_0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    t: Int[Array, "b"],
    levels: Levels,
) -> Loss:
    """The bound's loss from what the denoiser returned at x_t.

    The term is the KL for t ≥ 2 and the reconstruction at t = 1, so that the mean over uniform t
    is the bound.
    """
    step = levels.step(t)
    x_t = diffuse(x_0, step.log_snr, eps)
    prediction, extra = outputs
    error = reverse.eps_error_of(prediction, x_0, eps, step.log_snr) ** 2
    inner = Step(step.log_snr, jnp.where(t == 1, 1.0, step.gap))  # t = 1 has no KL
    kl = kl_of_error(error, inner, reverse.log_variance_ratio(inner, error, extra))
    x_0_hat = convert(prediction, x_t, step.log_snr, reverse.parameterization, "x_0")
    x_0_hat = jnp.where(expand(t == 1, x_0), x_0_hat, x_0)  # elsewhere there is nothing to decode
    decoded = -decoder(x_0, x_t, x_0_hat, levels)
    last = levels.step(jnp.full_like(t, levels.num_timesteps)).log_snr
    term = levels.num_timesteps * jnp.where(t == 1, decoded, kl)
    return Loss(_bits_per_dim(term, x_0), _bits_per_dim(prior_kl(x_0, last), x_0))


def _continuous_vlb(
    reverse: Reverse,
    decoder: Decoder,
    x_0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    log_snr: Float[Array, "b"],
    slope: Float[Array, "b"],
    levels: Levels,
    condition: PyTree | None = None,
) -> Loss:
    """The KL per unit of time, and both ends. A decoder that needs x̂_0 costs a second evaluation.

    The ends take the same ε: a sum of means is the mean of the sum.
    """
    rate = continuous_rate(reverse, x_0, eps, log_snr, slope, condition).kl
    last = jnp.full_like(log_snr, levels.log_snr[-1])
    ends = prior_kl(x_0, last) + reconstruction(reverse, decoder, x_0, eps, levels, condition)
    return Loss(_bits_per_dim(rate, x_0), _bits_per_dim(ends, x_0))


def _bits_per_dim(nats: Float[Array, "b"], x_0: Float[Array, "b *d"]) -> Float[Array, "b"]:
    return nats / (np.log(2.0) * np.prod(np.shape(x_0)[1:]))


def weighted(weight: Callable[[Float[Array, "b"]], Float[Array, "b"]]) -> Objective:
    """w(λ) ‖ε − ε̂‖² averaged over dimensions, under uniform times of the schedule.

    Args:
      weight: w, a function of the log-SNR.
    """

    def at(reverse, x_0, eps, log_snr, condition):
        error = reverse.squared_eps_error(x_0, eps, log_snr, condition)
        mean = error.mean(axis=tuple(range(1, error.ndim)))
        return Loss(weight(log_snr) * mean, jnp.zeros_like(mean))

    def discrete(reverse, decoder, x_0, eps, t, levels, condition=None):
        return at(reverse, x_0, eps, levels.step(t).log_snr, condition)

    def continuous(reverse, decoder, x_0, eps, log_snr, slope, levels, condition=None):
        return at(reverse, x_0, eps, log_snr, condition)

    return Objective(discrete, continuous)


def simple() -> Objective:
    """L_simple: every t alike. Ho et al. (2020), equation 14."""
    return weighted(jnp.ones_like)


def min_snr(gamma: float = 5.0) -> Objective:
    """min(SNR, γ)/SNR: on x_0's error the SNR, but at most γ. Hang et al. (2023), section 3.4."""
    return weighted(lambda log_snr: jnp.exp(jnp.minimum(np.log(gamma) - log_snr, 0.0)))


def truncated() -> Objective:
    """max(SNR, 1)/SNR: on x_0's error the SNR, but at least 1. Salimans and Ho (2022), 4."""
    return weighted(lambda log_snr: jnp.exp(jnp.maximum(-log_snr, 0.0)))


def p2(k: float = 1.0, gamma: float = 1.0) -> Objective:
    """1/(k + SNR)^γ. Choi et al. (2022), equation 8."""
    return weighted(lambda log_snr: jnp.exp(-gamma * jnp.logaddexp(np.log(k), log_snr)))


def sigmoid(bias: float = 2.0) -> Objective:
    """The bound's weight times sigmoid(b − λ), in bits/dim. Kingma and Gao (2023), section 5.

    The weight is per unit of log-SNR, so that the loss does not depend on the schedule between its
    ends. At t = 1, where there is no KL, it is zero.
    """

    def discrete(reverse, decoder, x_0, eps, t, levels, condition=None):
        step = levels.step(t)
        error = sum_per_example(reverse.squared_eps_error(x_0, eps, step.log_snr, condition))
        gap = jnp.where(t == 1, 0.0, step.gap)
        rate = 0.5 * levels.num_timesteps * jnp.expm1(gap) * error
        return weigh(rate, step.log_snr, x_0)

    def continuous(reverse, decoder, x_0, eps, log_snr, slope, levels, condition=None):
        rate = continuous_rate(reverse, x_0, eps, log_snr, slope, condition).kl
        return weigh(rate, log_snr, x_0)

    def weigh(rate, log_snr, x_0):
        return Loss(_bits_per_dim(jax.nn.sigmoid(bias - log_snr) * rate, x_0), jnp.zeros_like(rate))

    return Objective(discrete, continuous)


def hybrid(vlb_weight: float = 0.001) -> Objective:
    """L_simple for the mean, and a little of the bound for a learned Σ_θ alone.

    Nichol and Dhariwal (2021), equation 16, with the bound in bits/dim. In continuous time the
    bound does not depend on Σ_θ.
    """

    def discrete(reverse, decoder, x_0, eps, t, levels, condition=None):
        log_snr = levels.step(t).log_snr
        outputs = reverse.outputs(diffuse(x_0, log_snr, eps), log_snr, condition)
        error = reverse.eps_error_of(outputs.prediction, x_0, eps, log_snr) ** 2
        of_mean = error.mean(axis=tuple(range(1, error.ndim)))
        fixed = outputs._replace(prediction=jax.lax.stop_gradient(outputs.prediction))
        of_variance = _vlb_of(fixed, reverse, decoder, x_0, eps, t, levels)
        return Loss(of_mean + vlb_weight * of_variance.term, vlb_weight * of_variance.rest)

    return Objective(discrete, None)


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "vlb": vlb,
    "simple": simple,
    "hybrid": hybrid,
    "min_snr": min_snr,
    "truncated": truncated,
    "p2": p2,
    "sigmoid": sigmoid,
}
