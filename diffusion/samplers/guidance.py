"""Guidance: a model turned towards a condition, by its own two predictions or by a likelihood.

Both functions make one `Reverse` of another, so that every sampler can use the result.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from diffusion.gaussian import expand
from diffusion.reverse import PARAMETERIZATIONS, Outputs, Reverse, convert
from diffusion.schedules import Array, sigma

EVERYWHERE = (-float("inf"), float("inf"))
"""The interval of all log-SNRs."""

LogProb = Callable[
    [Float[Array, "b *d"], Float[Array, "b *d"], Float[Array, "b"]], Float[Array, "b"]
]
"""(x_t, x̂_0, log_snr) -> log p(y | x_t) of each example, in nats, up to a constant."""


def classifier_free(
    reverse: Reverse,
    scale: float,
    interval: tuple[float, float] = EVERYWHERE,
    rescale: float = 0.0,
) -> Reverse:
    """The unconditional prediction plus `scale` times what a condition changes in it.

    Its score is that of p(x_t) p(y | x_t)^scale. Ho and Salimans (2022), equation 6, with
    scale = w + 1. A learned Σ_θ stays the conditional model's.

    Args:
      reverse: a model whose denoiser takes a condition, and None for no condition.
      scale: at 1 it is the conditional model itself, with one evaluation.
      interval: the lowest and the highest log-SNR with guidance. At other levels the prediction is
        the conditional one, and the unconditional one is not evaluated (Kynkäänniemi et al. 2024).
      rescale: φ from 0 to 1: this much of the guided prediction is rescaled, each example by
        itself, to the conditional prediction's standard deviation over the example's coordinates
        (Lin et al. 2024, section 3.4). It acts on what the network predicts, so that it depends on
        the parameterisation; guidance without it does not.

    Raises:
      ValueError: if the interval's ends are the wrong way round.
    """
    if not interval[0] <= interval[1]:
        raise ValueError(f"interval = {interval}; it goes from a lower log-SNR to a higher one")
    if scale == 1:
        return reverse

    def denoiser(x_t, log_snr, condition=None):
        conditional, extra = reverse.outputs(x_t, log_snr, condition)
        inside = _is_inside(log_snr, interval)

        def guide():
            unconditional = reverse.outputs(x_t, log_snr, None).prediction
            guided = unconditional + scale * (conditional - unconditional)
            if rescale:
                guided *= 1 + rescale * (_restoring(guided, conditional) - 1)
            return jnp.where(expand(inside, x_t), guided, conditional)

        prediction = jax.lax.cond(jnp.any(inside), guide, lambda: conditional)
        return _joined(Outputs(prediction, extra))

    return reverse._replace(denoiser=denoiser)


def evaluations_at(
    log_snr: Float[Array, "*b"], scale: float, interval: tuple[float, float] = EVERYWHERE
) -> Int[Array, "*b"]:
    """Network evaluations of one call of a `classifier_free` denoiser: two where it guides."""
    return 1 + (_is_inside(log_snr, interval) & (scale != 1)).astype(jnp.int32)


def by_log_prob(reverse: Reverse, log_prob: LogProb, scale: float = 1.0) -> Reverse:
    """Guidance by a given log p(y | x_t): ε̂ − scale σ ∇ log p(y | x_t), whatever is predicted.

    The log-probability may look at x_t, as a classifier of noisy images does (Dhariwal and Nichol
    2021, algorithm 2), or at x̂_0, as a likelihood of measurements does (Ho et al. 2022, Video
    Diffusion Models, section 3.1; Chung et al. 2023): the gradient goes through x̂_0(x_t) too, and
    so through the network. A learned Σ_θ stays the model's.

    Args:
      reverse: the model; what it is guided to is the posterior p(x_0 | y) at scale 1.
      log_prob: (x_t, x̂_0, log_snr) -> [b], where each example's is a function of its own row.
      scale: a factor of the gradient.
    """
    factor = PARAMETERIZATIONS[reverse.parameterization].eps_error_factor

    def denoiser(x_t, log_snr, condition=None):
        def total(x):
            outputs = reverse.outputs(x, log_snr, condition)
            x_0_hat = convert(outputs.prediction, x, log_snr, reverse.parameterization, "x_0")
            return jnp.sum(log_prob(x, x_0_hat, log_snr)), outputs

        gradient, (prediction, extra) = jax.grad(total, has_aux=True)(jnp.asarray(x_t))
        # In the coordinates of the prediction, which need not be taken to ε and back.
        shift = -scale * sigma(log_snr) / factor(jnp.asarray(log_snr))
        return _joined(Outputs(prediction + expand(shift, x_t) * gradient, extra))

    return reverse._replace(denoiser=denoiser)


def _is_inside(log_snr: Float[Array, "*b"], interval: tuple[float, float]) -> Bool[Array, "*b"]:
    """Whether a level lies in the interval, its ends included; in the denoiser's float type."""
    log_snr = jnp.asarray(log_snr, float)
    return (interval[0] <= log_snr) & (log_snr <= interval[1])


def _joined(outputs: Outputs) -> Float[Array, "b ..."]:
    """What a denoiser returns."""
    if outputs.extra is None:
        return outputs.prediction
    return jnp.concatenate([outputs.prediction, outputs.extra], axis=-1)


def _restoring(guided: Float[Array, "b *d"], like: Float[Array, "b *d"]) -> Float[Array, "b ..."]:
    """The factor that gives `guided` the standard deviation of `like`, in each example.

    One where a prediction is the same in all coordinates, and the gradient has no NaN there.
    """
    axes = tuple(range(1, guided.ndim))
    variance, target = (jnp.var(of, axis=axes, keepdims=True) for of in (guided, like))
    varies = (variance > 0) & (target > 0)
    return jnp.sqrt(jnp.where(varies, target, 1.0) / jnp.where(varies, variance, 1.0))
