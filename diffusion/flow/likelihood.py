"""log p(x) by the probability-flow ODE.

With the log-SNR λ as time, x_λ = α x_0 + σ ε flows along dx/dλ = ½ σ (σ x − ε̂), and along it
d log p/dλ = −½ σ (σ d − tr ∂ε̂/∂x). Each example is solved separately, so that its likelihood does
not depend on its neighbours in the batch. The solvers need the package diffrax.

Song et al. (2021), section 4.3 and appendix D, with λ for their t.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key

from diffusion.flow.ode import Solver, integrate, velocity
from diffusion.gaussian import Gaussian
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from diffusion.schedules import Array

Probes = Float[Array, "b k *d"]
"""k random directions for each example, of mean zero and covariance I."""


class OdeLogProb(NamedTuple):
    """A log-density with its error estimates, per example.

    Attributes:
      log_prob: in nats; NaN if the solver did not reach the end.
      trace_se: standard error of log_prob over Hutchinson's probes, in nats; zero for the exact
        trace, NaN for a single probe.
      solver_error: estimate of the truncation error of the solver, in nats: the difference to a
        coarser solve, times `difference_to_error`. It is not a bound and does not include rounding.
        NaN if either solve fails.
      evaluations: network evaluations of both solves. An evaluation of the vector field counts as
        one, plus one for each direction in which the network is differentiated: k probes, or d.
    """

    log_prob: Float[Array, "*b"]
    trace_se: Float[Array, "*b"]
    solver_error: Float[Array, "*b"]
    evaluations: Int[Array, "*b"]


def example_probes(
    key: Key[Array, ""], index: Int[Array, "b"], num_probes: int, shape: tuple[int, ...]
) -> Probes:
    """Rademacher probes, ±1, as a pure function of (key, example).

    Args:
      key: the seed.
      index: the position of each row in the data set.
      num_probes: k, for each example.
      shape: shape of one example, without the batch axis.
    """

    def example(i):
        return jax.random.rademacher(jax.random.fold_in(key, i), (num_probes, *shape), float)

    return jax.vmap(example)(jnp.asarray(index))


def log_prob(
    model: DiffusionModel,
    x_1: Float[Array, "b *d"],
    solver: Solver,
    probes: Probes | None = None,
    chunk_size: int | None = None,
) -> OdeLogProb:
    """The model's log-density of x_1: N(0, I) at λ_T, transported along the flow to λ_1.

    log p(x_1) = log N(x_T; 0, I) + ∫ ∇·(dx/dλ) dλ from λ_1 to λ_T, along the flow from x_1 to x_T.

    Args:
      model: p, of which ε̂, λ_1 and λ_T are used; every leaf of its condition has the batch axis.
      x_1: noisy samples at the first level, x_1 = α_1 x_0 + σ_1 ε.
      solver: `Adaptive` or `FixedGrid`. The error estimate costs a second, coarser solve.
      probes: directions v of Hutchinson's estimate v·(∂ε̂/∂x)v of the trace, such as
        `example_probes`; None for the exact trace, from d derivatives at once.
      chunk_size: examples solved at once, each for as many steps as the slowest of them needs;
        None for all. Memory grows with chunk_size times the number of directions.

    Raises:
      ImportError: without diffrax.
      ValueError: if a fixed grid has an odd number of steps.
    """
    x_1 = jnp.asarray(x_1)
    batch = len(x_1)
    chunk_size = min(chunk_size or batch, batch)
    # Padded to whole chunks, so that the solve is compiled for one shape.
    padded = jnp.minimum(jnp.arange(batch + -batch % chunk_size), batch - 1)
    ends = model.levels.log_snr[1], model.levels.log_snr[-1]

    def at(example):
        x_1, probes, condition = example
        one_condition = jax.tree.map(lambda leaf: leaf[None], condition)
        return _log_prob_of_one(model.reverse.given(one_condition), ends, solver, x_1, probes)

    examples = x_1, probes, model.reverse.condition
    examples = jax.tree.map(lambda leaf: jnp.asarray(leaf)[padded], examples)
    results = jax.lax.map(at, examples, batch_size=chunk_size)
    return jax.tree.map(lambda leaf: leaf[:batch], results)


def _log_prob_of_one(reverse, ends, solver, x, probes):
    """`log_prob` of one example, without the batch axis."""
    coarse_per_probe, coarse = _solve(reverse, ends, solver.coarser(), x, probes)
    per_probe, fine = _solve(reverse, ends, solver, x, probes)
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


def _solve(
    reverse: Reverse,
    ends: tuple[float | Float[Array, ""], float | Float[Array, ""]],
    solver: Solver,
    x: Float[Array, "*d"],
    probes: Float[Array, "k *d"] | None,
) -> tuple[Float[Array, "_"], Int[Array, ""]]:
    """log p estimated from each probe separately, and the evaluations of the vector field."""
    log_snr_1, log_snr_T = (jnp.asarray(end, x.dtype) for end in ends)
    span = log_snr_T - log_snr_1
    directions = probes
    if probes is None:
        directions = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)

    def vector_field(time, state):
        log_snr = log_snr_1 + jnp.asarray(time, x.dtype) * span

        def flow(x):
            return span * velocity(reverse, x[None], log_snr[None])[0]

        # Forward mode costs half of reverse mode, and all directions share one evaluation.
        along = jax.vmap(lambda v: jax.jvp(flow, (state[0],), (v,)), out_axes=(None, 0))
        dx, derivatives = along(directions)
        quadratic = jnp.sum((directions * derivatives).reshape(len(directions), -1), axis=1)
        trace = quadratic.sum(keepdims=True) if probes is None else quadratic
        return dx, trace / x.size

    # The state has log p per dimension, so that one tolerance suits it and x.
    start = (x, jnp.zeros(1 if probes is None else len(probes), x.dtype))
    (x_end, per_dimension), evaluations = integrate(vector_field, start, solver)
    base = Gaussian(jnp.zeros_like(x_end), jnp.ones_like(x_end)).log_prob(x_end[None])
    return base + x.size * per_dimension, evaluations
