"""Training losses, as weightings of one error over noise levels (Kingma and Gao 2023).

With Σ_θ = β̃ the KL at t is ½ expm1(λ_{t−1} − λ_t) ‖ε − ε̂‖², and in continuous time its rate is
−½ dλ/dt ‖ε − ε̂‖². A loss is a choice of weight. OBJECTIVES holds functions that make an
`Objective`; their arguments are the hyperparameters of the loss.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion.bound import continuous_rate, kl_from_error, prior_kl, reconstruction
from diffusion.forward import diffuse
from diffusion.gaussian import expand, sum_per_example
from diffusion.model import DiffusionModel
from diffusion.reverse import Outputs, convert
from diffusion.schedules import Array, Numbers, Step, floats


class Loss(NamedTuple):
    """A loss of each example at a random time; the mean over uniform times is the training loss.

    Attributes:
      term: the part that depends on the time; the importance weight of t multiplies it.
      rest: the part that does not.
    """

    term: Float[Array, "b"]
    rest: Float[Array, "b"]


class Objective(NamedTuple):
    """A training loss in discrete and in continuous time.

    Attributes:
      discrete: (model, x_0, eps, t) -> Loss at timesteps t = 1 … T.
      continuous: (model, x_0, eps, log_snr, slope) -> Loss at times with these λ and dλ/dt. It uses
        only the first and the last of the model's levels. None if the loss is discrete only.
    """

    discrete: Callable[..., Loss]
    continuous: Callable[..., Loss] | None


def vlb() -> Objective:
    """The bound itself, in bits/dim: (13.26), or its limit as T → ∞."""
    return Objective(_discrete_vlb, _continuous_vlb)


def _discrete_vlb(
    model: DiffusionModel, x_0: Float[Array, "b *d"], eps: Float[Array, "b *d"], t: Numbers
) -> Loss:
    """T times the term at t, and the prior."""
    log_snr = model.levels.step(t).log_snr
    outputs = model.reverse.outputs(diffuse(x_0, log_snr, eps), log_snr)
    return _vlb_from_outputs(outputs, model, x_0, eps, t)


def _vlb_from_outputs(
    outputs: Outputs,
    model: DiffusionModel,
    x_0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    t: Numbers,
) -> Loss:
    """The bound as a loss, from the denoiser's outputs at x_t.

    The term is T times the KL for t ≥ 2 and T times the reconstruction at t = 1: its mean over
    uniform t is the bound without the prior.
    """
    t = jnp.asarray(t)
    reverse, levels, step = model.reverse, model.levels, model.levels.step(t)
    x_t = diffuse(x_0, step.log_snr, eps)
    prediction, extra = outputs
    error = reverse.eps_error(prediction, x_0, eps, step.log_snr) ** 2
    inner = Step(step.log_snr, jnp.where(t == 1, 1.0, step.gap))  # t = 1 has no KL
    kl = kl_from_error(error, inner, reverse.log_variance_ratio(inner, error, extra))
    x_0_hat = convert(prediction, x_t, step.log_snr, reverse.parameterization, "x_0")
    x_0_hat = jnp.where(expand(t == 1, x_0), x_0_hat, x_0)  # the decoder is used at t = 1 only
    decoded = -model.decoder(x_0, x_t, x_0_hat, levels)
    last = levels.step(jnp.full_like(t, levels.num_timesteps)).log_snr
    term = levels.num_timesteps * jnp.where(t == 1, decoded, kl)
    return Loss(_bits_per_dim(term, x_0), _bits_per_dim(prior_kl(x_0, last), x_0))


def _continuous_vlb(
    model: DiffusionModel,
    x_0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    log_snr: Numbers,
    slope: Numbers,
) -> Loss:
    """The KL per unit of time, and both ends. A decoder that needs x̂_0 costs a second evaluation.

    The reconstruction uses the same ε as the rate, which leaves the mean of their sum unbiased.
    """
    rate = continuous_rate(model.reverse, x_0, eps, log_snr, slope).kl
    last = jnp.full_like(floats(log_snr), model.levels.log_snr[-1])
    ends = prior_kl(x_0, last) + reconstruction(model, x_0, eps)
    return Loss(_bits_per_dim(rate, x_0), _bits_per_dim(ends, x_0))


def _bits_per_dim(nats: Float[Array, "b"], x_0: Float[Array, "b *d"]) -> Float[Array, "b"]:
    return nats / (np.log(2.0) * np.prod(np.shape(x_0)[1:]))


def weighted(weight: Callable[[Float[Array, "b"]], Float[Array, "b"]]) -> Objective:
    """w(λ) ‖ε − ε̂‖²/d, the mean over dimensions, at uniform times of the schedule.

    Args:
      weight: w, a function of the log-SNR.
    """

    def at(model, x_0, eps, log_snr):
        error = model.reverse.squared_eps_error(x_0, eps, log_snr)
        mean = error.mean(axis=tuple(range(1, error.ndim)))
        return Loss(weight(floats(log_snr)) * mean, jnp.zeros_like(mean))

    def discrete(model, x_0, eps, t):
        return at(model, x_0, eps, model.levels.step(t).log_snr)

    def continuous(model, x_0, eps, log_snr, slope):
        del slope
        return at(model, x_0, eps, log_snr)

    return Objective(discrete, continuous)


def simple() -> Objective:
    """L_simple: weight one at every t. Ho et al. (2020), equation 14."""
    return weighted(jnp.ones_like)


def min_snr(gamma: float = 5.0) -> Objective:
    """min(SNR, γ)/SNR: ‖x_0 − x̂_0‖² weighted by min(SNR, γ). Hang et al. (2023), section 3.4."""
    return weighted(lambda log_snr: jnp.exp(jnp.minimum(np.log(gamma) - log_snr, 0.0)))


def truncated() -> Objective:
    """max(SNR, 1)/SNR: ‖x_0 − x̂_0‖² weighted by max(SNR, 1). Salimans and Ho (2022), section 4."""
    return weighted(lambda log_snr: jnp.exp(jnp.maximum(-log_snr, 0.0)))


def p2(k: float = 1.0, gamma: float = 1.0) -> Objective:
    """1/(k + SNR)^γ. Choi et al. (2022), equation 8."""
    return weighted(lambda log_snr: jnp.exp(-gamma * jnp.logaddexp(np.log(k), log_snr)))


def sigmoid(bias: float = 2.0) -> Objective:
    """The bound's weight times sigmoid(b − λ), in bits/dim. Kingma and Gao (2023), section 5.

    The weight is per unit of log-SNR: the loss depends on the schedule through its two ends only.
    At t = 1, where there is no KL, it is zero.
    """

    def discrete(model, x_0, eps, t):
        step = model.levels.step(t)
        error = sum_per_example(model.reverse.squared_eps_error(x_0, eps, step.log_snr))
        gap = jnp.where(jnp.asarray(t) == 1, 0.0, step.gap)
        rate = 0.5 * model.levels.num_timesteps * jnp.expm1(gap) * error
        return weigh(rate, step.log_snr, x_0)

    def continuous(model, x_0, eps, log_snr, slope):
        rate = continuous_rate(model.reverse, x_0, eps, log_snr, slope).kl
        return weigh(rate, log_snr, x_0)

    def weigh(rate, log_snr, x_0):
        weight = jax.nn.sigmoid(bias - floats(log_snr))
        return Loss(_bits_per_dim(weight * rate, x_0), jnp.zeros_like(rate))

    return Objective(discrete, continuous)


def hybrid(vlb_weight: float = 0.001) -> Objective:
    """L_simple trains the mean; the bound, times a small weight, trains a learned Σ_θ only.

    Nichol and Dhariwal (2021), equation 16, with the bound in bits/dim, except at t = 1: their
    decoder has the learned Σ_θ, ours a fixed variance, so t = 1 does not train Σ_θ. There is no
    loss in continuous time, where the bound does not depend on Σ_θ.
    """

    def discrete(model, x_0, eps, t):
        log_snr = model.levels.step(t).log_snr
        outputs = model.reverse.outputs(diffuse(x_0, log_snr, eps), log_snr)
        error = model.reverse.eps_error(outputs.prediction, x_0, eps, log_snr) ** 2
        mean_loss = error.mean(axis=tuple(range(1, error.ndim)))
        fixed_mean = outputs._replace(prediction=jax.lax.stop_gradient(outputs.prediction))
        variance_loss = _vlb_from_outputs(fixed_mean, model, x_0, eps, t)
        return Loss(mean_loss + vlb_weight * variance_loss.term, vlb_weight * variance_loss.rest)

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
