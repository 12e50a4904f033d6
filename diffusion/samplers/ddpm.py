"""The samplers, by name: the model's own, DDIM and its inverse, and those of the files beside."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, PyTree

from diffusion.gaussian import expand
from diffusion.reverse import Reverse, convert
from diffusion.samplers.base import (
    X_0_TREATMENTS,
    Sampler,
    is_last,
    no_history,
    predict_x_0,
    scales,
)
from diffusion.schedules import Array, Levels


def ancestral(
    reverse: Reverse, x_0_treatment: str = "none", condition: PyTree | None = None
) -> Sampler:
    """The model's own sampler, (13.5): x_{t−1} ~ p_θ(x_{t−1} | x_t), and x̂_0 at the end.

    Ho et al. (2020), algorithm 2.
    """
    treat = X_0_TREATMENTS[x_0_treatment]

    def step(history, x_t, step, draw):
        prediction, extra = reverse.outputs(x_t, step.log_snr, condition)
        x_0_hat = convert(prediction, x_t, step.log_snr, reverse.parameterization, "x_0")
        x_0_hat = treat(x_0_hat)
        x_s = reverse.step(x_t, x_0_hat, step, extra).sample(draw(0))
        return history, jnp.where(is_last(step), x_0_hat, x_s), x_0_hat

    return Sampler(no_history, step)


def ddim(
    reverse: Reverse,
    x_0_treatment: str = "none",
    condition: PyTree | None = None,
    eta: float = 0.0,
) -> Sampler:
    """x_s = α_s x̂_0 + σ_s √(1 − η² c) ε̂ + η √β̃ z: deterministic at η = 0, ancestral at η = 1.

    At η = 0 it is the probability flow's exponential Euler step, of order one. Its noise does not
    depend on Σ_θ. Song et al. (2021), Denoising Diffusion Implicit Models, equation 12.

    Args:
      reverse: the model.
      x_0_treatment: a name in X_0_TREATMENTS; ε̂ is what the treated x̂_0 leaves of x_t.
      condition: passed to the denoiser.
      eta: how much of the posterior's noise is drawn, from 0 to 1.
    """

    def step(history, x_t, step, draw):
        x_0_hat = predict_x_0(reverse, x_0_treatment, x_t, step.log_snr, condition)
        a, s = scales(step.log_snr, x_t)
        eps_hat = (x_t - a * x_0_hat) / s
        a_s, s_s = scales(step.log_snr_s, x_t)
        kept = expand(jnp.sqrt(1 - eta**2 * step.c), x_t)
        x_s = a_s * x_0_hat + s_s * kept * eps_hat
        if eta:
            x_s += eta * s_s * expand(jnp.sqrt(step.c), x_t) * draw(0)
        return history, x_s, x_0_hat

    return Sampler(no_history, step, num_draws=1 if eta else 0)


def ddim_encode(
    reverse: Reverse,
    x_0: Float[Array, "b *d"],
    levels: Levels,
    iterations: int = 3,
    condition: PyTree | None = None,
) -> Float[Array, "b *d"]:
    """The noise x_T that deterministic DDIM turns into x_0, so that an image can be encoded.

    Each step is inverted by iterating x_t = α_t x̂_0(x_t) + σ_t (x_s − α_s x̂_0(x_t))/σ_s from the
    prediction at x_s, which converges where steps are small. The step to the data has no inverse:
    it starts from x_1 = α_1 x_0 + σ_1 ε̂(α_1 x_0).

    Args:
      reverse: the model.
      x_0: data.
      levels: T noise levels; decode with the same, by `ddim` and `sample`.
      iterations: network evaluations a step, at least one. One is the usual explicit inversion.
      condition: passed to the denoiser.
    """
    ones = jnp.ones(len(x_0), jnp.int32)
    first = levels.step(ones).log_snr
    a, s = scales(first, x_0)
    x_1 = a * x_0 + s * reverse.predict("eps", a * x_0, first, condition)

    def advance(x_s, t):
        step = levels.step(t * ones)
        a, s = scales(step.log_snr, x_s)
        a_s, s_s = scales(step.log_snr_s, x_s)

        def improve(_, x_and_level):
            x, level = x_and_level
            x_0_hat = reverse.predict("x_0", x, level, condition)
            return a * x_0_hat + s * (x_s - a_s * x_0_hat) / s_s, step.log_snr

        x_t, _ = jax.lax.fori_loop(0, iterations, improve, (x_s, step.log_snr_s))
        return x_t, None

    return jax.lax.scan(advance, x_1, jnp.arange(2, levels.num_timesteps + 1))[0]
