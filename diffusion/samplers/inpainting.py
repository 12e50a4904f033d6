"""Inpainting: any sampler, with a part of the data known."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from diffusion.forward import diffuse, transition
from diffusion.samplers.base import Sampler
from diffusion.schedules import Array


def inpainted(
    sampler: Sampler,
    x_0: Float[Array, "b *d"],
    mask: Shaped[Array, "..."],
    num_resamplings: int = 1,
) -> Sampler:
    """A sampler whose x_s is a draw of q(x_s | x_0) where x_0 is known, and x_0 itself at the end.

    The sampler does not see that draw when it makes the unknown part. So x_s is noised back to t by
    q(x_t | x_s) and the step is repeated; with more repetitions the two parts agree better. Lugmayr
    et al. (2022), RePaint, algorithm 1, except that the step to the data is repeated too.

    The reported predictions are those of the last repetition, of the known part too. A repeated
    step starts without history, because the history of a multistep solver belongs to another path
    and extrapolation from it is unstable. The solver then has order one.

    Args:
      sampler: the sampler.
      x_0: data; values outside the mask are not used.
      mask: true, or 1, where x_0 is known; broadcastable to x_0.
      num_resamplings: repetitions of each step, at least one. Evaluations grow by this factor. If
        the sampler counts evaluations in its history, the last repetition counts for all.

    Raises:
      ValueError: if num_resamplings is less than one.
    """
    if num_resamplings < 1:
        raise ValueError(f"num_resamplings = {num_resamplings}; it must be at least 1")
    is_known = jnp.broadcast_to(jnp.asarray(mask, bool), jnp.shape(x_0))
    forget = sampler.forget if num_resamplings > 1 else (lambda history: history)
    stride = sampler.num_draws + 2  # the sampler's draws, the known part's, and q(x_t | x_s)'s

    def step(history, x_t, step, draw):
        history = forget(history)

        def once(i, after):
            _, x_s, _ = after
            x = jax.lax.cond(
                i > 0, lambda: transition(x_s, step).sample(draw(i * stride - 1)), lambda: x_t
            )
            after = sampler.step(history, x, step, lambda k: draw(i * stride + k))
            history_s, x_s, x_0_hat = after
            known = diffuse(x_0, step.log_snr_s, draw(i * stride + sampler.num_draws))
            return history_s, jnp.where(is_known, known, x_s), x_0_hat

        return jax.lax.fori_loop(0, num_resamplings, once, (history, x_t, jnp.zeros_like(x_t)))

    return sampler._replace(
        step=step,
        num_draws=num_resamplings * stride - 1,
        evaluations=lambda history, n: num_resamplings * sampler.evaluations(history, n),
    )
