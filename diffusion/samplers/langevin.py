"""Langevin dynamics: a single step, a corrector between the steps of a sampler, and annealed.

Lecture 13, (13.1). The model's score at a level is (α x̂_0 − x)/σ².
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion.model import DiffusionModel
from diffusion.samplers.base import Draw, Sampler, is_last, no_history, scales
from diffusion.schedules import Array, Step


def langevin_step(
    x: Float[Array, "b *d"],
    score: Float[Array, "b *d"],
    eta: float | Float[Array, "..."],
    z: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """x + η ∇log p(x) + √(2η) z: √(2η) is the standard deviation of the noise.

    Lecture 13, (13.1). There is no Metropolis correction: if p is N(m, v), the stationary variance
    of the chain is v/(1 − η/(2v)), which needs η < 2v.

    Args:
      x: the state of the chain.
      score: ∇ log p at x.
      eta: η, a number or broadcastable to x.
      z: standard normal noise.
    """
    return x + eta * score + jnp.sqrt(2 * eta) * z


def corrected(
    sampler: Sampler, model: DiffusionModel, num_steps: int = 1, snr: float = 0.16
) -> Sampler:
    """A predictor with a corrector: Langevin steps at level t before each step of the sampler.

    Song et al. (2021), Score-Based Generative Modeling, algorithms 4 and 5. The signal-to-noise
    ratio of a Langevin step is r = ‖η s‖/‖√(2η) z‖, in root mean squares. That of the score s is
    taken to be 1/σ_t, its value if ε̂ has unit variance: η = 2 r² σ_t². The published code uses the
    norms of the batch instead: then a sample depends on its neighbours, and the step size depends
    on x, which changes the stationary distribution.

    The reported predictions are those of the sampler.

    Args:
      sampler: the predictor.
      model: p, whose score the Langevin steps follow.
      num_steps: Langevin steps at each level, with one network evaluation each.
      snr: r < 1. If the variance at the level is σ_t², the stationary variance of the steps is too
        large by a fraction of about r².
    """
    move = _moves(model, num_steps, snr)

    def step(history, x_t, step, draw):
        x_t, _ = move(x_t, step, draw)
        return sampler.step(history, x_t, step, lambda k: draw(num_steps + k))

    return sampler._replace(
        step=step,
        num_draws=num_steps + sampler.num_draws,
        evaluations=lambda history, n: num_steps * n + sampler.evaluations(history, n),
    )


def annealed(model: DiffusionModel, num_steps: int = 5, snr: float = 0.22) -> Sampler:
    """Annealed Langevin dynamics: Langevin steps at each level; x/α does not change between levels.

    Song and Ermon (2019), algorithm 1, with the steps of `corrected`; x̂_0 at the end, as in
    Jolicoeur-Martineau et al. (2020). The reported predictions are those of the last step.

    At a cleaner level x has too much noise at first, which the Langevin steps remove. For normal
    data and many small steps the variance of the samples is too large by a factor 1 + 1/(K − 1),
    where K = 4 r² times the number of steps per unit of log-SNR. At K ≤ 1 the excess grows.

    Args:
      model: p.
      num_steps: Langevin steps at each level, with one network evaluation each; the step to the
        data has one more.
      snr: r, as in `corrected`; the default is that of Song and Ermon.
    """
    move = _moves(model, num_steps, snr)

    def step(history, x_t, step, draw):
        x_t, x_0_hat = move(x_t, step, draw)
        a_t, _ = scales(step.log_snr, x_t)
        a_s, _ = scales(step.log_snr_s, x_t)

        def to_data():
            x_0 = model.reverse.predict("x_0", x_t, step.log_snr)
            return x_0, x_0

        x_s, x_0_hat = jax.lax.cond(is_last(step), to_data, lambda: (a_s / a_t * x_t, x_0_hat))
        return history, x_s, x_0_hat

    return Sampler(
        no_history, step, num_draws=num_steps, evaluations=lambda history, n: num_steps * n + 1
    )


def _moves(
    model: DiffusionModel, num_steps: int, snr: float
) -> Callable[[Array, Step, Draw], tuple[Array, Array]]:
    """(x_t, Step, draw) -> (x_t after the Langevin steps, x̂_0 of the last one)."""

    def move(x_t, step, draw):
        a, s = scales(step.log_snr, x_t)

        def once(k, x_and_x_0_hat):
            x, _ = x_and_x_0_hat
            x_0_hat = model.reverse.predict("x_0", x, step.log_snr)
            score = (a * x_0_hat - x) / s**2
            return langevin_step(x, score, 2 * snr**2 * s**2, draw(k)), x_0_hat

        # A loop, so that the program does not grow with the number of steps.
        return jax.lax.fori_loop(0, num_steps, once, (x_t, jnp.zeros_like(x_t)))

    return move
