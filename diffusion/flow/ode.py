"""The probability flow as an ODE in the log-SNR, and its solvers, through diffrax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PyTree

from diffusion.gaussian import expand
from diffusion.reverse import Reverse
from diffusion.schedules import Array, Numbers, sigma


class Method(NamedTuple):
    """An explicit Runge-Kutta method.

    Attributes:
      name: diffrax's class.
      order: the error of a whole solve falls with the step to this power.
      evaluations: evaluations of the vector field in each step but the first.
      reuses_last: the last evaluation of a step is the first of the next, so that the first step
        has one more.
    """

    name: str
    order: int
    evaluations: int
    reuses_last: bool


METHODS: dict[str, Method] = {
    "heun": Method("Heun", 2, 2, False),
    "tsit5": Method("Tsit5", 5, 6, True),
    "dopri8": Method("Dopri8", 8, 13, True),
}


class Adaptive(NamedTuple):
    """Steps chosen by the local error, independently for each example.

    The error of a step is the larger of two root mean squares: of the error of x over coordinates,
    and of the error of log p, in nats per dimension, over probes. So a tolerance means the same in
    any dimension and with any number of probes. In float32 rounding matters below 1e-6.

    Attributes:
      rtol: relative tolerance.
      atol: absolute tolerance.
      max_steps: largest number of steps, rejected ones included; an example that needs more
        becomes NaN.
      method: a name in METHODS.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 1000
    method: str = "tsit5"

    def coarser(self) -> "Adaptive":
        """Ten times the tolerance."""
        return self._replace(rtol=10 * self.rtol, atol=10 * self.atol)

    @property
    def difference_to_error(self) -> float:
        """One: the difference is about the error of the coarser solve, which exceeds this one's."""
        return 1.0

    def stepping(self, diffrax: Any) -> dict[str, Any]:
        """The arguments of `diffrax.diffeqsolve`, for a time that runs from 0 to 1."""
        controller = diffrax.PIDController(rtol=self.rtol, atol=self.atol, norm=_largest_rms)
        # The first step is a hundredth of the way; if it is too long, it is rejected.
        return {"dt0": 0.01, "stepsize_controller": controller, "max_steps": self.max_steps}


class FixedGrid(NamedTuple):
    """Equal steps in λ.

    Attributes:
      num_steps: even, because the error is estimated with half as many steps.
      method: a name in METHODS.
    """

    num_steps: int
    method: str = "tsit5"

    def coarser(self) -> "FixedGrid":
        """Half as many steps.

        Raises:
          ValueError: if num_steps is odd or zero.
        """
        if self.num_steps < 2 or self.num_steps % 2:
            raise ValueError(f"num_steps = {self.num_steps}; it must be even and at least 2")
        return self._replace(num_steps=self.num_steps // 2)

    @property
    def difference_to_error(self) -> float:
        """1/(2ᵖ − 1), Richardson's factor at order p, if the h^p term dominates the error."""
        return 1 / (2 ** METHODS[self.method].order - 1)

    def stepping(self, diffrax: Any) -> dict[str, Any]:
        """The arguments of `diffrax.diffeqsolve`, whose steps are constant by default."""
        return {"dt0": 1 / self.num_steps, "max_steps": self.num_steps}


Solver = Adaptive | FixedGrid


def velocity(reverse: Reverse, x_t: Float[Array, "b *d"], log_snr: Numbers) -> Float[Array, "b *d"]:
    """dx/dλ = ½ σ (σ x − ε̂), the probability flow with λ as time."""
    s = expand(sigma(log_snr), x_t)
    return 0.5 * s * (s * x_t - reverse.predict("eps", x_t, log_snr))


def integrate(
    vector_field: Callable[[Float[Array, ""], PyTree], PyTree], start: PyTree, solver: Solver
) -> tuple[PyTree, Int[Array, ""]]:
    """Solves dy/dt = f(t, y) from t = 0 to 1, for one example without the batch axis.

    Args:
      vector_field: f.
      start: y(0).
      solver: `Adaptive` or `FixedGrid`.

    Returns:
      y(1), or NaN if the solver did not reach t = 1, and the number of evaluations of f.

    Raises:
      ImportError: without diffrax.
    """
    diffrax = import_diffrax()
    method = METHODS[solver.method]
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda time, state, args: vector_field(time, state)),
        getattr(diffrax, method.name)(),
        t0=0.0,
        t1=1.0,
        y0=start,
        throw=False,
        **solver.stepping(diffrax),
    )
    reached = diffrax.is_successful(solution.result)
    # diffrax's results have a leading axis of times, here of length one.
    end = jax.tree.map(lambda leaf: jnp.where(reached, leaf[0], jnp.nan), solution.ys)
    return end, solution.stats["num_steps"] * method.evaluations + method.reuses_last


def _largest_rms(state: PyTree) -> Float[Array, ""]:
    """The larger of the root mean squares of the errors of x and of log p."""
    return jnp.max(jnp.stack([jnp.sqrt(jnp.mean(leaf**2)) for leaf in jax.tree.leaves(state)]))


def import_diffrax() -> Any:
    """Imports diffrax, which only the solvers of the probability flow need."""
    try:
        import diffrax
    except ImportError as error:
        raise ImportError("the probability flow needs the package diffrax >= 0.7") from error
    return diffrax
