"""The compiled programs of an evaluation.

Random numbers are functions of (seed, example, t), so that the batch size and the devices change
nothing beyond rounding. Parameters and levels are arguments, so that other weights and a learned
schedule need no new program.

A program is called as `program(subject, index, *others)`, where `index` [b] numbers the examples.
It was compiled for the `model`, `to_data`, `seed` and `chunk_size` of the subject that it was made
for; parameters, levels and examples are those of the subject that it is called with.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from diffusion.bound import Bound, bound, continuous_rate, prior_kl, reconstruction, step_terms
from diffusion.bound import terms_at as bound_terms_at
from diffusion.flow.dequantization import (
    DiscreteBound,
    noise_dequantization,
    uniform_dequantization,
)
from diffusion.flow.likelihood import example_probes
from diffusion.flow.ode import Adaptive, FixedGrid
from diffusion.forward import Noise, example_noise
from diffusion.model import DiffusionModel
from diffusion.schedules import Step
from diffusion.trajectory import step_log_ratio, trajectory
from experiments.harness import devices
from experiments.harness.evaluation.subject import Subject
from experiments.harness.processes import cores
from experiments.harness.seeds import stream

Program = Callable[..., object]

ENDS_SLOT = 2**30  # the noises of the reconstruction have the slots from here on


def make_bound(subject: Subject) -> Callable[..., Bound]:
    """The bound with the full sum over t: (subject, index) -> Bound [b, …] in nats."""

    def full(model, x_0, index):
        return bound(model, x_0, evaluation_noise(subject, index), subject.chunk_size)

    return compile_program(subject, full)


def make_terms_at(subject: Subject, draw: int) -> Callable[..., Bound]:
    """The bound at some timesteps t ≥ 2: (subject, index, t [b m]) -> Bound with KLs [b m].

    Args:
      subject: the subject.
      draw: numbers independent noises of an example; the full bound uses 0.
    """

    def some(model, x_0, index, t):
        noise, ones = evaluation_noise(subject, index, draw), jnp.ones_like(index)
        terms = bound_terms_at(model, x_0, t, noise, subject.chunk_size)
        return Bound(
            prior=_prior(model, x_0),
            kl=terms.kl,
            reconstruction=reconstruction(model, x_0, noise(ones)),
            eps_error=terms.eps_error,
        )

    return compile_program(subject, some)


class Points(NamedTuple):
    """Points at which the integrand of the diffusion term is evaluated, one for each row.

    Attributes:
      log_snr: λ.
      rate: the gap of the step at T levels; in continuous time −dλ/dt.
      slot: numbers the point's noise; points of one example with the same slot share it.
    """

    log_snr: Float[Array, "b"]
    rate: Float[Array, "b"]
    slot: Int[Array, "b"]

    @classmethod
    def at(
        cls,
        subject: Subject,
        time: Float[np.ndarray, "b"],
        slot: Int[np.ndarray, "b"],
        continuous: bool,
    ) -> "Points":
        """From times in [0, 1), in float64. At T levels the T − 1 KLs share [0, 1) equally."""
        if continuous:
            knots = subject.schedule.knots
            pieces = len(knots) - 1
            log_snr = np.interp(time * pieces, np.arange(pieces + 1), knots)
            slopes = -np.diff(knots) * pieces
            rate = slopes[np.minimum((time * pieces).astype(int), pieces - 1)]
        else:
            t = 2 + (time * (subject.levels.num_timesteps - 1)).astype(int)
            log_snr, rate = subject.levels.log_snr[t], subject.levels.gap[t]
        return cls(np.float32(log_snr), np.float32(rate), np.asarray(slot, np.int32))


class Rates(NamedTuple):
    """The integrand at `Points`; its mean over uniform time is the diffusion term.

    Attributes:
      value: in nats.
      controls: the control variates, of mean zero over the noise (`statistics.control`), in nats.
      eps_error: ‖ε − ε̂‖².
    """

    value: Float[Array, "*b"]
    controls: Float[Array, "*b c"]
    eps_error: Float[Array, "*b"]


def make_rates(subject: Subject, continuous: bool) -> Callable[..., Rates]:
    """The integrand as (subject, index, points, draw [b], controls) -> Rates [b].

    `draw` numbers independent noises of the same slots; `controls` is a tuple of `Control`s.
    """
    num_terms = max(subject.levels.num_timesteps - 1, 1)

    def rates(model, x_0, index, points, draw, controls):
        eps = slot_noise(subject, index, draw)(points.slot)
        if continuous:
            terms = continuous_rate(model.reverse, x_0, eps, points.log_snr, -points.rate)
            scale = 0.5 * points.rate
        else:
            terms = step_terms(model.reverse, x_0, eps, Step(points.log_snr, points.rate))
            terms = terms._replace(kl=num_terms * terms.kl)
            scale = 0.5 * num_terms * jnp.expm1(points.rate)
        variates = [scale * control(x_0, eps, points.log_snr) for control in controls]
        return Rates(terms.kl, jnp.stack(variates, axis=-1), terms.eps_error)

    return compile_program(subject, rates, num_shared=1)


def make_log_ratios(subject: Subject) -> Callable[..., Float[Array, "b"]]:
    """T − 1 times the log-ratio of (13.10) at single steps: (subject, index, points, draw [b])."""
    num_terms = subject.levels.num_timesteps - 1

    def log_ratios(model, x_0, index, points, draw):
        noise = slot_noise(subject, index, draw)
        noises = noise(2 * points.slot), noise(2 * points.slot + 1)
        step = Step(points.log_snr, points.rate)
        return num_terms * step_log_ratio(model.reverse, x_0, *noises, step)[1]

    return compile_program(subject, log_ratios)


def make_ends(subject: Subject) -> Callable[..., tuple[Float[Array, "b"], Float[Array, "b"]]]:
    """(subject, index, draw [b], slot [b]) -> prior [b] and reconstruction [b]."""

    def ends(model, x_0, index, draw, slot):
        eps = slot_noise(subject, index, draw)(ENDS_SLOT + slot)
        return _prior(model, x_0), reconstruction(model, x_0, eps)

    return compile_program(subject, ends)


def make_trajectory(subject: Subject) -> Callable[..., Float[Array, "b"]]:
    """(13.10) along whole trajectories: (subject, index, draw [b]) -> totals [b]."""

    def totals(model, x_0, index, draw):
        return trajectory(model, x_0, slot_noise(subject, index, draw)).total

    return compile_program(subject, totals)


def make_ode(subject: Subject, settings: ConfigDict) -> Callable[..., DiscreteBound]:
    """The bound of the probability-flow ODE: (subject, index, draw [b]) -> DiscreteBound [b].

    Solves `chunk_size` examples at a time; those take as many steps as the slowest of them.

    Args:
      subject: the subject.
      settings: `evaluate.ode`.
    """
    solver = Adaptive(settings.tolerance, settings.tolerance, settings.max_steps, settings.method)
    if settings.num_steps:
        solver = FixedGrid(settings.num_steps, settings.method)

    def solve(model, x_0, index, draw):
        probes = None
        if settings.trace == "hutchinson":
            root = jax.random.fold_in(stream(subject.seed, "probes"), draw[0])
            probes = example_probes(root, index, settings.probes, subject.shape)
        if settings.dequantization == "uniform":
            keys = _example_keys(subject, index, draw)
            u = jax.vmap(lambda key: jax.random.uniform(key, subject.shape))(keys)
            y = x_0 + subject.spacing * (u - 0.5)
            spacing = subject.spacing
            return uniform_dequantization(model, y, spacing, solver, probes, subject.chunk_size)
        eps = slot_noise(subject, index, draw)(jnp.zeros_like(index))
        return noise_dequantization(model, x_0, eps, solver, probes, subject.chunk_size)

    return compile_program(subject, solve)


def _prior(model: DiffusionModel, x_0: Float[Array, "b *d"]) -> Float[Array, "b"]:
    last = jnp.full(len(x_0), model.levels.num_timesteps)
    return prior_kl(x_0, model.levels.step(last).log_snr)


def evaluation_noise(subject: Subject, index: Int[Array, "b"], draw: int = 0) -> Noise:
    """The noise of an evaluation: a function of (seed, example, t, draw)."""
    return example_noise(stream(subject.seed, "evaluate"), index, subject.shape, draw)


def slot_noise(subject: Subject, index: Int[Array, "b"], draw: Int[Array, "b"]) -> Noise:
    """The noise of an estimate, a stream of its own: a function of (seed, example, slot, draw)."""
    keys = _example_keys(subject, index, draw)

    def noise(slot):
        at_slot = jax.vmap(jax.random.fold_in)(keys, slot)
        return jax.vmap(lambda key: jax.random.normal(key, subject.shape))(at_slot)

    return noise


def _example_keys(subject: Subject, index: Int[Array, "b"], draw: Int[Array, "b"]) -> Array:
    """Keys [b], each a function of (seed, example, draw)."""
    root = stream(subject.seed, "estimate")
    return jax.vmap(lambda i, d: jax.random.fold_in(jax.random.fold_in(root, i), d))(index, draw)


def compile_program(subject: Subject, function: Callable, num_shared: int = 0) -> Program:
    """Compiles a function of examples, with full-precision matrix products.

    Each device, and each core of a CPU, runs the function on its own examples, and nothing is
    communicated. If several processes run together, each gets all results, as NumPy arrays.

    Args:
      subject: gives the model and x_0.
      function: (model, x_0 [b, …], index [b], *others) -> pytree of arrays [b, …].
      num_shared: the last `num_shared` others are the same for all examples.

    Returns:
      (subject, index, *others) -> the function's results.
    """
    mesh = devices.mesh()
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def local(params, levels, shared, examples, index, others):
        model = subject.model(params, examples.labels)._replace(levels=levels)
        return function(model, subject.to_data(examples.images), index, *others, *shared)

    compiled = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(whole, whole, whole, split, split, split),
            out_specs=split,
            check_vma=False,
        )
    )

    def run(subject, index, *others):
        batched, shared = others[: len(others) - num_shared], others[len(others) - num_shared :]

        def call(index, *batched):
            examples = subject.dataset.examples(index)
            with jax.default_matmul_precision("highest"):
                results = compiled(subject.params, subject.levels, shared, examples, index, batched)
            return results if jax.process_count() == 1 else devices.gather(results)

        return cores.in_parts(call, index, *batched)

    return run
