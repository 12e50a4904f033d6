"""The compiled programs of an evaluation.

Random numbers are functions of (seed, example, t), so that the batch size and the devices change
nothing beyond rounding. Parameters, levels and the seed are arguments, so that other weights, a
learned schedule and another seed need no new program.

A program is called as `program(subject, index, *others)`, where `index` [b] numbers the examples.
It was compiled for the `model`, `to_data` and `chunk_size` of the subject that it was made for;
parameters, levels, seed and examples are those of the subject that it is called with.
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
from experiments.harness import devices, seeds
from experiments.harness.evaluation.subject import Subject
from experiments.harness.processes import cores
from experiments.harness.processes.shared_programs import share

Program = Callable[..., object]

ENDS_SLOT = 2**30  # the noises of the reconstruction have the slots from here on


class Batch(NamedTuple):
    """Some examples inside a program, and their random numbers.

    Attributes:
      x_0: the examples, in data units.
      index: their numbers in the data set.
      root: the key of the seed.
    """

    x_0: Float[Array, "b *d"]
    index: Int[Array, "b"]
    root: seeds.Root

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.x_0.shape[1:]

    def noise(self, draw: int = 0) -> Noise:
        """The noise of an evaluation: a function of (seed, example, t, draw)."""
        return example_noise(seeds.stream(self.root, "evaluate"), self.index, self.shape, draw)

    def slot_noise(self, draw: Int[Array, "b"]) -> Noise:
        """The noise of an estimate, another stream: a function of (seed, example, slot, draw)."""
        keys = self.keys(draw)

        def noise(slot):
            at_slot = jax.vmap(jax.random.fold_in)(keys, slot)
            return jax.vmap(lambda key: jax.random.normal(key, self.shape))(at_slot)

        return noise

    def keys(self, draw: Int[Array, "b"]) -> Array:
        """Keys [b] of an estimate, each a function of (seed, example, draw)."""
        root = seeds.stream(self.root, "estimate")
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        return jax.vmap(jax.random.fold_in)(fold(root, self.index), draw)


def make_bound(subject: Subject) -> Callable[..., Bound]:
    """The bound with the full sum over t: (subject, index) -> Bound [b, …] in nats."""

    def full(model, batch):
        return bound(model, batch.x_0, batch.noise(), subject.chunk_size)

    return compile_program(subject, full)


def make_terms_at(subject: Subject, draw: int) -> Callable[..., Bound]:
    """The bound at some timesteps t ≥ 2: (subject, index, t [b m]) -> Bound with KLs [b m].

    Args:
      subject: the subject.
      draw: numbers independent noises of an example; the full bound uses 0.
    """

    def some(model, batch, t):
        x_0, noise, ones = batch.x_0, batch.noise(draw), jnp.ones_like(batch.index)
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

    def rates(model, batch, points, draw, controls):
        x_0, eps = batch.x_0, batch.slot_noise(draw)(points.slot)
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

    def log_ratios(model, batch, points, draw):
        noise = batch.slot_noise(draw)
        noises = noise(2 * points.slot), noise(2 * points.slot + 1)
        step = Step(points.log_snr, points.rate)
        return num_terms * step_log_ratio(model.reverse, batch.x_0, *noises, step)[1]

    return compile_program(subject, log_ratios)


def make_ends(subject: Subject) -> Callable[..., tuple[Float[Array, "b"], Float[Array, "b"]]]:
    """(subject, index, draw [b], slot [b]) -> prior [b] and reconstruction [b]."""

    def ends(model, batch, draw, slot):
        eps = batch.slot_noise(draw)(ENDS_SLOT + slot)
        return _prior(model, batch.x_0), reconstruction(model, batch.x_0, eps)

    return compile_program(subject, ends)


def make_trajectory(subject: Subject) -> Callable[..., Float[Array, "b"]]:
    """(13.10) along whole trajectories: (subject, index, draw [b]) -> totals [b]."""

    def totals(model, batch, draw):
        return trajectory(model, batch.x_0, batch.slot_noise(draw)).total

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

    def solve(model, batch, draw):
        probes = None
        if settings.trace == "hutchinson":
            root = jax.random.fold_in(seeds.stream(batch.root, "probes"), draw[0])
            probes = example_probes(root, batch.index, settings.probes, batch.shape)
        if settings.dequantization == "uniform":
            u = jax.vmap(lambda key: jax.random.uniform(key, batch.shape))(batch.keys(draw))
            y = batch.x_0 + subject.spacing * (u - 0.5)
            spacing = subject.spacing
            return uniform_dequantization(model, y, spacing, solver, probes, subject.chunk_size)
        eps = batch.slot_noise(draw)(jnp.zeros_like(batch.index))
        return noise_dequantization(model, batch.x_0, eps, solver, probes, subject.chunk_size)

    return compile_program(subject, solve)


def _prior(model: DiffusionModel, x_0: Float[Array, "b *d"]) -> Float[Array, "b"]:
    last = jnp.full(len(x_0), model.levels.num_timesteps)
    return prior_kl(x_0, model.levels.step(last).log_snr)


def compile_program(subject: Subject, function: Callable, num_shared: int = 0) -> Program:
    """Compiles a function of examples, with full-precision matrix products.

    Each device, and each core of a CPU, runs the function on its own examples, and nothing is
    communicated. If several processes run together, each gets all results, as NumPy arrays.

    Args:
      subject: gives the model and `to_data`.
      function: (model, batch, *others) -> pytree of arrays [b, …], where batch is a `Batch`.
      num_shared: the last `num_shared` others are the same for all examples.

    Returns:
      (subject, index, *others) -> the function's results.
    """
    mesh = devices.mesh()
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def local(params, levels, root, shared, examples, index, others):
        model = subject.model(params, examples.labels)._replace(levels=levels)
        batch = Batch(subject.to_data(examples.images), index, root)
        return function(model, batch, *others, *shared)

    compiled = share(
        jax.jit(
            jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(whole, whole, whole, whole, split, split, split),
                out_specs=split,
                check_vma=False,
            )
        )
    )

    def run(subject, index, *others):
        batched, shared = others[: len(others) - num_shared], others[len(others) - num_shared :]
        replicated = subject.params, subject.levels, seeds.root(subject.seed), shared

        def call(index, *batched):
            with jax.default_matmul_precision("highest"):
                results = compiled(*replicated, subject.dataset.examples(index), index, batched)
            return results if jax.process_count() == 1 else devices.gather(results)

        return cores.in_parts(call, index, *batched)

    return run
