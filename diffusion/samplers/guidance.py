"""Guidance towards a condition, by the model's own two predictions or by a likelihood.

Both functions return a new model, which every sampler can use.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from diffusion.gaussian import expand
from diffusion.model import DiffusionModel
from diffusion.reverse import PARAMETERIZATIONS, Outputs, convert
from diffusion.schedules import Array, Numbers, sigma

EVERYWHERE = (-float("inf"), float("inf"))
"""The interval of all log-SNRs."""

LogProb = Callable[
    [Float[Array, "b *d"], Float[Array, "b *d"], Float[Array, "b"]], Float[Array, "b"]
]
"""(x_t, x̂_0, log_snr) -> log p(y | x_t) of each example, in nats, up to a constant."""


def classifier_free(
    model: DiffusionModel,
    scale: float,
    interval: tuple[float, float] = EVERYWHERE,
    rescale: float = 0.0,
) -> DiffusionModel:
    """unconditional + scale (conditional − unconditional), of the model's two predictions.

    Its score is that of p(x_t) p(y | x_t)^scale. A learned Σ_θ is that of the conditional model. Ho
    and Salimans (2022), equation 6, with scale = w + 1.

    Args:
      model: p, given a condition now or later; its denoiser accepts None for no condition.
      scale: at 1 the result is the conditional model itself, with one evaluation.
      interval: the lowest and the highest log-SNR with guidance. At other levels the prediction is
        the conditional one, and the unconditional one is not evaluated (Kynkäänniemi et al. 2024).
      rescale: φ from 0 to 1. The guided prediction of each example is scaled towards the standard
        deviation of the conditional one over coordinates, fully at φ = 1 (Lin et al. 2024, section
        3.4). This acts on the network's own prediction, so it depends on the parameterisation.

    Raises:
      ValueError: if the lower end of the interval is above the upper one.
    """
    if not interval[0] <= interval[1]:
        raise ValueError(f"interval = {interval}; it goes from a lower log-SNR to a higher one")
    if scale == 1:
        return model
    reverse = model.reverse

    def denoiser(x_t, log_snr, condition=None):
        conditional, extra = reverse.given(condition).outputs(x_t, log_snr)
        inside = _is_inside(log_snr, interval)

        def guide():
            unconditional = reverse.given(None).outputs(x_t, log_snr).prediction
            guided = unconditional + scale * (conditional - unconditional)
            if rescale:
                guided *= 1 + rescale * (_std_ratio(conditional, guided) - 1)
            return jnp.where(expand(inside, x_t), guided, conditional)

        prediction = jax.lax.cond(jnp.any(inside), guide, lambda: conditional)
        return Outputs(prediction, extra).joined()

    return model._replace(reverse=reverse._replace(denoiser=denoiser))


def evaluations_at(
    log_snr: Numbers, scale: float, interval: tuple[float, float] = EVERYWHERE
) -> Int[Array, "..."]:
    """Network evaluations in one call of a `classifier_free` denoiser: two inside the interval."""
    return 1 + (_is_inside(log_snr, interval) & (scale != 1)).astype(jnp.int32)


def by_log_prob(model: DiffusionModel, log_prob: LogProb, scale: float = 1.0) -> DiffusionModel:
    """Guidance by a given log p(y | x_t): ε̂ − scale σ ∇ log p(y | x_t), in any parameterisation.

    The log-probability may depend on x_t, as a classifier of noisy images does (Dhariwal and Nichol
    2021, algorithm 2), or on x̂_0, as a likelihood of measurements does (Ho et al. 2022, Video
    Diffusion Models, section 3.1; Chung et al. 2023). The gradient goes through x̂_0(x_t), and so
    through the network. A learned Σ_θ does not change.

    Args:
      model: p, the prior; at scale 1 the guided model samples the posterior p(x_0 | y).
      log_prob: (x_t, x̂_0, log_snr) -> [b]; the value of each example depends on its own row only.
      scale: factor of the gradient.
    """
    reverse = model.reverse
    factor = PARAMETERIZATIONS[reverse.parameterization].eps_error_factor

    def denoiser(x_t, log_snr, condition=None):
        def total(x):
            outputs = reverse.given(condition).outputs(x, log_snr)
            x_0_hat = convert(outputs.prediction, x, log_snr, reverse.parameterization, "x_0")
            return jnp.sum(log_prob(x, x_0_hat, log_snr)), outputs

        gradient, (prediction, extra) = jax.grad(total, has_aux=True)(jnp.asarray(x_t))
        # In the coordinates of the prediction: no conversion to ε and back.
        shift = -scale * sigma(log_snr) / factor(log_snr)
        return Outputs(prediction + expand(shift, x_t) * gradient, extra).joined()

    return model._replace(reverse=reverse._replace(denoiser=denoiser))


def _is_inside(log_snr: Numbers, interval: tuple[float, float]) -> Bool[Array, "..."]:
    """Whether a level lies in the closed interval; compared in the denoiser's float type."""
    log_snr = jnp.asarray(log_snr, float)
    return (interval[0] <= log_snr) & (log_snr <= interval[1])


def _std_ratio(x: Float[Array, "b *d"], y: Float[Array, "b *d"]) -> Float[Array, "b ..."]:
    """std(x)/std(y) of each example, over coordinates.

    It is one, with a finite gradient, where either is constant.
    """
    axes = tuple(range(1, x.ndim))
    var_x, var_y = (jnp.var(values, axis=axes, keepdims=True) for values in (x, y))
    varies = (var_x > 0) & (var_y > 0)
    return jnp.sqrt(jnp.where(varies, var_x, 1.0) / jnp.where(varies, var_y, 1.0))
