"""The model's own sampler, DDIM, and the inverse of DDIM."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion.gaussian import expand
from diffusion.model import DiffusionModel
from diffusion.reverse import convert
from diffusion.samplers.base import Sampler, is_last, no_history, scales
from diffusion.schedules import Array


def ancestral(model: DiffusionModel) -> Sampler:
    """The model's own sampler, (13.5): x_{t−1} ~ p_θ(x_{t−1} | x_t), and x̂_0 at the end.

    Ho et al. (2020), algorithm 2.
    """
    reverse = model.reverse

    def step(history, x_t, step, draw):
        prediction, extra = reverse.outputs(x_t, step.log_snr)
        x_0_hat = convert(prediction, x_t, step.log_snr, reverse.parameterization, "x_0")
        x_s = reverse.step(x_t, x_0_hat, step, extra).sample(draw(0))
        return history, jnp.where(is_last(step), x_0_hat, x_s), x_0_hat

    return Sampler(no_history, step)


def ddim(model: DiffusionModel, eta: float = 0.0) -> Sampler:
    """x_s = α_s x̂_0 + σ_s √(1 − η² c) ε̂ + η √β̃ z: deterministic at η = 0, ancestral at η = 1.

    At η = 0 it is the exponential Euler step of the probability flow, of order one. Its noise does
    not depend on Σ_θ. Song et al. (2021), Denoising Diffusion Implicit Models, equation 12.

    Args:
      model: p.
      eta: standard deviation of the noise relative to the posterior's √β̃, from 0 to 1.
    """

    def step(history, x_t, step, draw):
        x_0_hat = model.reverse.predict("x_0", x_t, step.log_snr)
        a, s = scales(step.log_snr, x_t)
        eps_hat = (x_t - a * x_0_hat) / s
        a_s, s_s = scales(step.log_snr_s, x_t)
        eps_scale = expand(jnp.sqrt(1 - eta**2 * step.c), x_t)
        x_s = a_s * x_0_hat + s_s * eps_scale * eps_hat
        if eta:
            x_s += eta * s_s * expand(jnp.sqrt(step.c), x_t) * draw(0)
        return history, x_s, x_0_hat

    return Sampler(no_history, step, num_draws=1 if eta else 0)


def ddim_encode(
    model: DiffusionModel, x_0: Float[Array, "b *d"], iterations: int = 3
) -> Float[Array, "b *d"]:
    """The noise x_T that deterministic DDIM turns into x_0.

    Each step is inverted by iterating x_t = α_t x̂_0(x_t) + σ_t (x_s − α_s x̂_0(x_t))/σ_s from the
    prediction at x_s, which converges where steps are small. The step to the data has no inverse:
    the encoding starts from x_1 = α_1 x_0 + σ_1 ε̂(α_1 x_0).

    Args:
      model: p. Decode with the same levels, by `ddim` and `sample`.
      x_0: data.
      iterations: network evaluations of each step, at least one. One is the explicit inversion.
    """
    reverse, ones = model.reverse, jnp.ones(len(x_0), jnp.int32)
    first = model.levels.step(ones).log_snr
    a, s = scales(first, x_0)
    x_1 = a * x_0 + s * reverse.predict("eps", a * x_0, first)

    def advance(x_s, t):
        step = model.levels.step(t * ones)
        a, s = scales(step.log_snr, x_s)
        a_s, s_s = scales(step.log_snr_s, x_s)

        def improve(_, x_and_level):
            x, level = x_and_level
            x_0_hat = reverse.predict("x_0", x, level)
            return a * x_0_hat + s * (x_s - a_s * x_0_hat) / s_s, step.log_snr

        x_t, _ = jax.lax.fori_loop(0, iterations, improve, (x_s, step.log_snr_s))
        return x_t, None

    return jax.lax.scan(advance, x_1, jnp.arange(2, model.levels.num_timesteps + 1))[0]
