"""log p(x) by the probability-flow ODE.

With the log-SNR λ as time, x_λ = α x_0 + σ ε flows along dx/dλ = ½ σ (σ x − ε̂), and along it
d log p/dλ = −½ σ (σ d − tr ∂ε̂/∂x). Every example is a solve of its own, so that no likelihood
depends on its neighbours. Without the package diffrax there is an ImportError.

Song et al. (2021), section 4.3 and appendix D, with λ for their t.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key, PyTree

from diffusion.flow.ode import Solver, integrate, velocity
from diffusion.gaussian import Gaussian
from diffusion.reverse import Reverse
from diffusion.schedules import Array

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
