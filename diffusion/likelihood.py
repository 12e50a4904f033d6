"""log p(x) by the probability-flow ODE.

With the log-SNR λ as time, x_λ = α x_0 + σ ε flows along dx/dλ = ½ σ (σ x − ε̂), and along it
d log p/dλ = −½ σ (σ d − tr ∂ε̂/∂x). Every example is a solve of its own, so that no likelihood
depends on its neighbours. Without the package diffrax there is an ImportError.

Song et al. (2021), section 4.3 and appendix D, with λ for their t.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key, PyTree

from diffusion.gaussian import Gaussian, expand
from diffusion.reverse import Reverse
from diffusion.schedules import Array, sigma


class Method(NamedTuple):
    """An explicit Runge-Kutta method.

    Attributes:
      name: diffrax's class.
      order: the error of a whole solve falls with the step to this power.
      evaluations: of the vector field, in a step, once the solve has begun.
      reuses_last: a step's last evaluation is the next one's first; the first step has one more.
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
    """Steps chosen by the local error, for each example alone.

    A step's error is that of x, in root mean square over its coordinates, or that of log p in nats
    a dimension, in root mean square over the probes, whichever is larger. So a tolerance means the
    same in any dimension, and with any number of probes. In float32 rounding is felt below 1e-6.

    Attributes:
      rtol: relative tolerance.
      atol: absolute tolerance.
      max_steps: tried, whether accepted or not; an example that needs more gets NaN.
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
        """One: the difference is mostly the coarser solve's error, which is mostly the larger."""
        return 1.0

    def stepping(self, diffrax: Any) -> dict[str, Any]:
        """The arguments of `diffrax.diffeqsolve`, for a time that runs from 0 to 1."""
        controller = diffrax.PIDController(rtol=self.rtol, atol=self.atol, norm=_largest_rms)
        # The first step is a hundredth of the way; too long a one is tried again.
        return {"dt0": 0.01, "stepsize_controller": controller, "max_steps": self.max_steps}


class FixedGrid(NamedTuple):
    """Equal steps in λ.

    Attributes:
      num_steps: even, since the error is estimated with half as many.
      method: a name in METHODS.
    """

    num_steps: int
    method: str = "tsit5"

    def coarser(self) -> "FixedGrid":
        """Half as many steps.

        Raises:
          ValueError: if they are odd or none.
        """
        if self.num_steps < 2 or self.num_steps % 2:
            raise ValueError(f"num_steps = {self.num_steps}; it must be even and at least 2")
        return self._replace(num_steps=self.num_steps // 2)

    @property
    def difference_to_error(self) -> float:
        """1/(2ᵖ − 1), Richardson's factor at order p; right as far as the error is its h^p term."""
        return 1 / (2 ** METHODS[self.method].order - 1)

    def stepping(self, diffrax: Any) -> dict[str, Any]:
        """The arguments of `diffrax.diffeqsolve`, whose steps are constant by default."""
        return {"dt0": 1 / self.num_steps, "max_steps": self.num_steps}


Solver = Adaptive | FixedGrid

Probes = Float[Array, "b k *d"]
"""k random directions for each example, of mean zero and covariance I."""


class OdeLogProb(NamedTuple):
    """A log-density with the errors that are known of it, per example.

    Attributes:
      log_prob: in nats; NaN where the solve did not reach its end.
      trace_se: standard error of log_prob over Hutchinson's probes, in nats; zero where the trace
        is exact, NaN with a single probe.
      solver_error: estimate of the solver's truncation error, in nats; no bound, and not of
        rounding. The difference to a coarser solve, times `difference_to_error`; NaN if either
        fails.
      evaluations: of the network, both solves together. One of the vector field counts as one, and
        one more for each direction that the network is differentiated in: the k probes, or all d.
    """

    log_prob: Float[Array, "*b"]
    trace_se: Float[Array, "*b"]
    solver_error: Float[Array, "*b"]
    evaluations: Int[Array, "*b"]


def example_probes(
    key: Key[Array, ""], index: Int[Array, "b"], num_probes: int, shape: tuple[int, ...]
) -> Probes:
    """Rademacher probes, ±1: functions of (key, example) and of nothing else.

    Args:
      key: the seed.
      index: which example of the data set each row is.
      num_probes: k, for each example.
      shape: of one example, without the batch axis.
    """

    def of_example(i):
        return jax.random.rademacher(jax.random.fold_in(key, i), (num_probes, *shape), float)

    return jax.vmap(of_example)(jnp.asarray(index))


def velocity(
    reverse: Reverse,
    x_t: Float[Array, "b *d"],
    log_snr: Float[Array, "b"],
    condition: PyTree | None = None,
) -> Float[Array, "b *d"]:
    """dx/dλ = ½ σ (σ x − ε̂), the probability flow with λ as time."""
    s = expand(sigma(log_snr), x_t)
    return 0.5 * s * (s * x_t - reverse.predict("eps", x_t, log_snr, condition))


def log_prob(
    reverse: Reverse,
    x: Float[Array, "b *d"],
    log_snr_max: float | Float[Array, ""],
    log_snr_min: float | Float[Array, ""],
    solver: Solver,
    probes: Probes | None = None,
    condition: PyTree | None = None,
    chunk_size: int | None = None,
) -> OdeLogProb:
    """The model's log-density of x_t at λ_max: N(0, I) at λ_min, carried along the flow.

    log p(x) = log N(x at λ_min; 0, I) + ∫ ∇·(dx/dλ) dλ from λ_max to λ_min, along the flow from x.

    Args:
      reverse: the model; its Σ_θ plays no part.
      x: noisy samples at λ_max, x_t = α x_0 + σ ε.
      log_snr_max: λ_max, where the density is asked for.
      log_snr_min: λ_min, where it is N(0, I).
      solver: `Adaptive` or `FixedGrid`. The error estimate costs a second, coarser solve.
      probes: directions of Hutchinson's estimate of the trace, v·(∂ε̂/∂x)v, such as
        `example_probes`; None for the exact trace, by d derivatives that share memory.
      condition: passed to the denoiser; every leaf has the batch axis.
      chunk_size: examples solved together, each for as many steps as the slowest of them takes;
        None for all. Memory grows with chunk_size times the number of directions.

    Raises:
      ImportError: without diffrax.
      ValueError: if a fixed grid has an odd number of steps.
    """
    x = jnp.asarray(x)
    batch = len(x)
    chunk_size = min(chunk_size or batch, batch)
    # Filled up to whole chunks, so that the solve is compiled for one shape.
    filled = jnp.minimum(jnp.arange(batch + -batch % chunk_size), batch - 1)

    def at(example):
        return _log_prob_of_one(reverse, log_snr_max, log_snr_min, solver, *example)

    examples = jax.tree.map(lambda leaf: jnp.asarray(leaf)[filled], (x, probes, condition))
    results = jax.lax.map(at, examples, batch_size=chunk_size)
    return jax.tree.map(lambda leaf: leaf[:batch], results)


def _log_prob_of_one(reverse, log_snr_max, log_snr_min, solver, x, probes, condition):
    """`log_prob` of one example, without the batch axis."""

    def solve(solver):
        return _solve(reverse, log_snr_max, log_snr_min, solver, x, probes, condition)

    (coarse_per_probe, coarse), (per_probe, fine) = solve(solver.coarser()), solve(solver)
    difference = jnp.abs(per_probe.mean() - coarse_per_probe.mean())
    if probes is None:
        trace_se = jnp.zeros_like(difference)
    elif len(probes) == 1:
        trace_se = jnp.full_like(difference, jnp.nan)
    else:
        trace_se = jnp.std(per_probe, ddof=1) / len(probes) ** 0.5
    return OdeLogProb(
        log_prob=per_probe.mean(),
        trace_se=trace_se,
        solver_error=difference * solver.difference_to_error,
        evaluations=(fine + coarse) * (1 + (x.size if probes is None else len(probes))),
    )


def _solve(reverse, log_snr_max, log_snr_min, solver, x, probes, condition):
    """log p by each probe alone, and how often the vector field was evaluated."""
    log_snr_max = jnp.asarray(log_snr_max, x.dtype)
    span = jnp.asarray(log_snr_min, x.dtype) - log_snr_max
    one_condition = jax.tree.map(lambda leaf: leaf[None], condition)
    directions = probes
    if probes is None:
        directions = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)

    def vector_field(time, state):
        log_snr = log_snr_max + jnp.asarray(time, x.dtype) * span

        def flow(x):
            return span * velocity(reverse, x[None], log_snr[None], one_condition)[0]

        # Forward mode costs half of reverse mode here, and evaluates the network once for all.
        along = jax.vmap(lambda v: jax.jvp(flow, (state[0],), (v,)), out_axes=(None, 0))
        dx, derivatives = along(directions)
        quadratic = jnp.sum((directions * derivatives).reshape(len(directions), -1), axis=1)
        trace = quadratic.sum(keepdims=True) if probes is None else quadratic
        return dx, trace / x.size

    # log p is carried a dimension, so that one tolerance suits it and x.
    start = (x, jnp.zeros(1 if probes is None else len(probes), x.dtype))
    (x_end, per_dimension), evaluations = integrate(vector_field, start, solver)
    base = Gaussian(jnp.zeros_like(x_end), jnp.ones_like(x_end)).log_prob(x_end[None])
    return base + x.size * per_dimension, evaluations


def integrate(
    vector_field: Callable[[Float[Array, ""], PyTree], PyTree], start: PyTree, solver: Solver
) -> tuple[PyTree, Int[Array, ""]]:
    """y(1) of the solution of dy/dt = f(t, y), for one example without the batch axis.

    Args:
      vector_field: f.
      start: y(0).
      solver: `Adaptive` or `FixedGrid`.

    Returns:
      y(1), all NaN where the solve did not reach it, and how often f was evaluated.

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
    # diffrax puts an axis of one time before.
    end = jax.tree.map(lambda leaf: jnp.where(reached, leaf[0], jnp.nan), solution.ys)
    return end, solution.stats["num_steps"] * method.evaluations + method.reuses_last


def _largest_rms(state: PyTree) -> Float[Array, ""]:
    """The larger of the root mean squares of x's error and of log p's."""
    return jnp.max(jnp.stack([jnp.sqrt(jnp.mean(leaf**2)) for leaf in jax.tree.leaves(state)]))


def import_diffrax() -> Any:
    """The package diffrax, which nothing but the solves of the flow needs."""
    try:
        import diffrax
    except ImportError as error:
        raise ImportError("the probability flow needs the package diffrax >= 0.7") from error
    return diffrax
