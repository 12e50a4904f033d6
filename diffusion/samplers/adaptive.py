"""The probability flow between levels, solved with adaptive steps."""

import jax
import jax.numpy as jnp

from diffusion.flow.ode import Adaptive, import_diffrax, integrate, velocity
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from diffusion.samplers.base import Sampler, is_last


def adaptive(
    model: DiffusionModel, tolerance: float = 1e-4, max_steps: int = 1000, method: str = "tsit5"
) -> Sampler:
    """The probability flow dx/dλ = ½ σ (σ x − ε̂) from level to level, each example with its steps.

    The step to the data is x̂_0. With two levels the whole flow is one solve. Each level costs one
    evaluation more than the solve, for the x̂_0 that is reported. Song et al. (2021), section 4.3,
    with λ for their t.

    Args:
      model: p; every leaf of its condition has the batch axis.
      tolerance: of the error of a step in x, root mean square over coordinates, relative and
        absolute. In float32 rounding matters below 1e-6.
      max_steps: largest number of steps between two levels, rejected ones included; an example
        that needs more becomes NaN.
      method: a name in METHODS.

    Raises:
      ImportError: without diffrax.
    """
    import_diffrax()  # fails here rather than in the middle of a run
    solver = Adaptive(tolerance, tolerance, max_steps, method)
    reverse = model.reverse

    def predict(x_t, log_snr, condition=None):
        return reverse.given(condition).predict("x_0", x_t, log_snr)

    # ε̂ is computed from x̂_0 in every parameterisation, as in the other samplers.
    through_x_0 = Reverse(predict, "x_0")

    def solve_one(x_t, log_snr, gap, condition):
        """x_s and the number of evaluations of one example, all without the batch axis."""
        reverse_of_one = through_x_0.given(jax.tree.map(lambda leaf: leaf[None], condition))

        def vector_field(time, x):
            log_snr_here = log_snr + jnp.asarray(time, x.dtype) * gap
            return gap * velocity(reverse_of_one, x[None], log_snr_here[None])[0]

        return integrate(vector_field, x_t, solver)

    def step(evaluations, x_t, step, draw):
        del draw
        x_0_hat = reverse.predict("x_0", x_t, step.log_snr)

        def solve():
            return jax.vmap(solve_one)(x_t, step.log_snr, step.gap, reverse.condition)

        x_s, more = jax.lax.cond(
            is_last(step), lambda: (x_0_hat, jnp.zeros_like(evaluations)), solve
        )
        return evaluations + 1 + more, x_s, x_0_hat

    return Sampler(
        lambda x_T: jnp.zeros(len(x_T), int),
        step,
        num_draws=0,
        evaluations=lambda history, num_steps: history,
    )
