"""Langevin dynamics: by itself, between the steps of another sampler, and from level to level.

Lecture 13, (13.1). The model's score at a level is (α x̂_0 − x)/σ².
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, PyTree

from diffusion.reverse import Reverse
from diffusion.samplers.base import Draw, Sampler, is_last, no_history, predict_x_0, scales
from diffusion.schedules import Array, Step


def langevin_step(
    x: Float[Array, "b *d"],
    score: Float[Array, "b *d"],
    eta: float | Float[Array, "..."],
    z: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """x + η ∇log p(x) + √(2η) z: √(2η) is the standard deviation of the noise.

    Lecture 13, (13.1). Unadjusted: where p is N(m, v) the moves settle at the variance
    v/(1 − η/(2v)), and η < 2v is needed.

    Args:
      x: where the chain is.
      score: ∇ log p at x.
      eta: η, a number or broadcastable to x.
      z: standard normal noise.
    """
    return x + eta * score + jnp.sqrt(2 * eta) * z


def corrected(
    sampler: Sampler,
    reverse: Reverse,
    x_0_treatment: str = "none",
    condition: PyTree | None = None,
    num_steps: int = 1,
    snr: float = 0.16,
) -> Sampler:
    """Langevin moves at level t before each step of a sampler from t: predictor and corrector.

    Song et al. (2021), Score-Based Generative Modeling, algorithms 4 and 5. A move's
    signal-to-noise ratio is r = ‖η s‖/‖√(2η) z‖ in root mean square, with 1/σ_t for the score's,
    which it is when ε̂ has unit variance: η = 2 r² σ_t². The published code takes the norms of the
    batch instead. Then a sample would depend on its neighbours, and a step size that depends on x
    leaves the chain without its stationary distribution.

    The predictions reported are the sampler's own.

    Args:
      sampler: the predictor.
      reverse: the model whose score the moves follow.
      x_0_treatment: a name in X_0_TREATMENTS, of the x̂_0 that the score is made of.
      condition: passed to the denoiser.
      num_steps: moves at each level, with one network evaluation each.
      snr: r. At a small r a move is small; r² is the relative excess of the variance that the
        moves settle at where that is σ_t², and r < 1 is needed.
    """
    move = _moves(reverse, x_0_treatment, condition, num_steps, snr)

    def step(history, x_t, step, draw):
        x_t, _ = move(x_t, step, draw)
        return sampler.step(history, x_t, step, lambda k: draw(num_steps + k))

    return sampler._replace(
        step=step,
        num_draws=num_steps + sampler.num_draws,
        evaluations=lambda history, n: num_steps * n + sampler.evaluations(history, n),
    )


def annealed(
    reverse: Reverse,
    x_0_treatment: str = "none",
    condition: PyTree | None = None,
    num_steps: int = 5,
    snr: float = 0.22,
) -> Sampler:
    """Annealed Langevin dynamics: moves at each level, and x/α carried to the next one unchanged.

    Song and Ermon (2019), algorithm 1, with the moves of `corrected`; x̂_0 at the end, as in
    Jolicoeur-Martineau et al. (2020). The predictions reported are those of the last move.

    Going to a cleaner level leaves too much noise on x, which the moves there take away. On a
    normal, with many small steps, the samples' variance ends too large by a factor 1 + 1/(K − 1),
    where K = 4 r² times the moves per unit of log-SNR; at K ≤ 1 the excess outgrows them.

    Args:
      reverse: the model.
      x_0_treatment: a name in X_0_TREATMENTS.
      condition: passed to the denoiser.
      num_steps: moves at each level, with one network evaluation each; the end has one more.
      snr: r, as in `corrected`; by default that of Song and Ermon.
    """
    move = _moves(reverse, x_0_treatment, condition, num_steps, snr)

    def step(history, x_t, step, draw):
        x_t, x_0_hat = move(x_t, step, draw)
        a_t, _ = scales(step.log_snr, x_t)
        a_s, _ = scales(step.log_snr_s, x_t)

        def to_data():
            x_0 = predict_x_0(reverse, x_0_treatment, x_t, step.log_snr, condition)
            return x_0, x_0

        x_s, x_0_hat = jax.lax.cond(is_last(step), to_data, lambda: (a_s / a_t * x_t, x_0_hat))
        return history, x_s, x_0_hat

    return Sampler(
        no_history, step, num_draws=num_steps, evaluations=lambda history, n: num_steps * n + 1
    )


def _moves(
    reverse: Reverse, x_0_treatment: str, condition: PyTree | None, num_steps: int, snr: float
) -> Callable[[Array, Step, Draw], tuple[Array, Array]]:
    """(x_t, Step, draw) -> (x_t after the moves, x̂_0 that the last of them followed)."""

    def move(x_t, step, draw):
        a, s = scales(step.log_snr, x_t)

        def once(k, x_and_x_0_hat):
            x, _ = x_and_x_0_hat
            x_0_hat = predict_x_0(reverse, x_0_treatment, x, step.log_snr, condition)
            score = (a * x_0_hat - x) / s**2
            return langevin_step(x, score, 2 * snr**2 * s**2, draw(k)), x_0_hat

        # A loop, so that the program does not grow with the moves.
        return jax.lax.fori_loop(0, num_steps, once, (x_t, jnp.zeros_like(x_t)))

    return move
