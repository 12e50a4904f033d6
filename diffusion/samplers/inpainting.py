"""Inpainting: any sampler, held to the part of the data that is known."""

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
    """A sampler whose x_s has a draw of q(x_s | x_0) where x_0 is known, and x_0 at the end.

    The rest was made without regard to that draw. So the whole is taken back to t, by q(x_t | x_s),
    and the step repeated: the more often, the closer the two parts come to belonging together.
    Lugmayr et al. (2022), RePaint, algorithm 1, but that the step to the data is repeated too.

    The predictions reported are the sampler's last, of the known part too. A step that is repeated
    starts from no history: what a multistep solver remembers is of another path, and extrapolating
    from it is unstable. So each is of the solver's first order.

    Args:
      sampler: what to run.
      x_0: data; what it holds outside the mask does not matter.
      mask: true, or 1, where x_0 is known; broadcastable to x_0.
      num_resamplings: how often each step is made, at least once. Evaluations grow by this factor:
        a sampler that counts them in its history has the last repetition's taken for all.

    Raises:
      ValueError: if no step is made.
    """
    if num_resamplings < 1:
        raise ValueError(f"num_resamplings = {num_resamplings}; each step is made at least once")
    is_known = jnp.broadcast_to(jnp.asarray(mask, bool), jnp.shape(x_0))
    forget = sampler.forget if num_resamplings > 1 else (lambda history: history)
    stride = sampler.num_draws + 2  # the sampler's own draws, the known part's, the way back's

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
