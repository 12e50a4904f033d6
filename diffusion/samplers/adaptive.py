"""The probability flow between levels, solved by steps that the error chooses."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from diffusion.flow.ode import Adaptive, import_diffrax, integrate, velocity
from diffusion.reverse import Reverse
from diffusion.samplers.base import Sampler, is_last, predict_x_0


def adaptive(
    reverse: Reverse,
    x_0_treatment: str = "none",
    condition: PyTree | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 1000,
    method: str = "tsit5",
) -> Sampler:
    """The probability flow from level to level, each example with steps of its own.

    dx/dλ = ½ σ (σ x − ε̂), ε̂ being what the treated x̂_0 leaves of x. The step to the data is x̂_0.
    With two levels the whole flow is one solve. x̂_0 costs one evaluation a level: the solver's own
    first one is out of reach. Song et al. (2021), section 4.3, with λ for their t.

    Args:
      reverse: the model.
      x_0_treatment: a name in X_0_TREATMENTS.
      condition: passed to the denoiser; every leaf has the batch axis.
      tolerance: of a step's error in x, root mean square over its coordinates, relative and
        absolute; in float32 rounding is felt below 1e-6.
      max_steps: tried between two levels, whether accepted or not; an example that needs more
        becomes NaN.
      method: a name in METHODS.

    Raises:
      ImportError: without diffrax.
    """
    import_diffrax()  # so that without it nothing begins
    solver = Adaptive(tolerance, tolerance, max_steps, method)

    def predict(x_t, log_snr, condition=None):
        return predict_x_0(reverse, x_0_treatment, x_t, log_snr, condition)

    treated = Reverse(predict, "x_0")

    def solve_one(x_t, log_snr, gap, condition):
        """x_s and the number of evaluations, of one example without the batch axis."""
        one_condition = jax.tree.map(lambda leaf: leaf[None], condition)

        def vector_field(time, x):
            here = log_snr + jnp.asarray(time, x.dtype) * gap
            return gap * velocity(treated, x[None], here[None], one_condition)[0]

        return integrate(vector_field, x_t, solver)

    def step(evaluations, x_t, step, draw):
        del draw
        x_0_hat = predict(x_t, step.log_snr, condition)

        def solve():
            return jax.vmap(solve_one)(x_t, step.log_snr, step.gap, condition)

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
