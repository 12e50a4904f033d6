"""The compiled programs of an evaluation and of sampling.

Their random numbers are functions of (seed, example, t): the batch size and the devices change
nothing beyond rounding. Levels are arguments, so that a learned schedule needs no new program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from diffusion.bound import Bound, bound, continuous_rate, prior_kl, reconstruction, step_terms
from diffusion.bound import terms_at as kl_at
from diffusion.flow.dequantization import (
    DiscreteBound,
    noise_dequantization,
    uniform_dequantization,
)
from diffusion.flow.likelihood import example_probes
from diffusion.flow.ode import Adaptive, FixedGrid
from diffusion.forward import example_noise
from diffusion.schedules import Levels, Schedule, Step
from diffusion.statistics.control import GaussianControl
from diffusion.trajectory import step_log_ratio, trajectory
from experiments.harness import devices
from experiments.harness.data.splits import Examples
from experiments.harness.seeds import stream
from experiments.harness.setup.definition import ModelDefinition


def make_bound(
    config: ConfigDict, definition: ModelDefinition, mesh: Mesh
) -> Callable[[Any, Levels, Examples, Int[Array, "b"]], Bound]:
    """The full-sum bound as (params, levels, examples, index [b]) -> Bound [b]."""

    def full(params, levels, examples, index):
        x_0 = definition.quantization.to_data(examples.images)
        noise = evaluation_noise(config, definition, index)
        model = definition.model(params, examples.labels)._replace(levels=levels)
        return bound(model, x_0, noise, config.evaluate.chunk_size)

    return jit_evaluation(full, mesh, num_batched=2)


def make_terms_at(
    config: ConfigDict, definition: ModelDefinition, mesh: Mesh, draw: int
) -> Callable[..., Bound]:
    """The bound at some timesteps: (params, levels, examples, index, t [b m]) -> Bound, KLs [b m].

    Args:
      config: the config.
      definition: the mathematics it names.
      mesh: the devices.
      draw: which of an example's independent noises; the full bound uses 0.
    """

    def some(params, levels, examples, index, t):
        x_0 = definition.quantization.to_data(examples.images)
        noise = evaluation_noise(config, definition, index, draw)
        model = definition.model(params, examples.labels)._replace(levels=levels)
        ones = jnp.ones_like(index)
        terms = kl_at(model, x_0, t, noise, config.evaluate.chunk_size)
        return Bound(
            prior=prior_kl(x_0, levels.step(levels.num_timesteps * ones).log_snr),
            kl=terms.kl,
            reconstruction=reconstruction(model, x_0, noise(ones)),
            eps_error=terms.eps_error,
        )

    return jit_evaluation(some, mesh, num_batched=3)


ENDS_SLOT = 2**30  # from here on are the noises of the reconstruction


class Points(NamedTuple):
    """Where the diffusion term's integrand over time is evaluated: m points for each example.

    Attributes:
      log_snr: λ.
      rate: the gap of the step at T levels; in continuous time −dλ/dt.
      slot: numbers the point's noise: two points of an example with one slot share it.
    """

    log_snr: Float[Array, "b m"]
    rate: Float[Array, "b m"]
    slot: Int[Array, "b m"]

    @classmethod
    def at(
        cls,
        definition: ModelDefinition,
        time: Float[np.ndarray, "b m"],
        slot: Int[np.ndarray, "b m"],
        continuous: bool,
    ) -> "Points":
        """From times in [0, 1), in float64. At T levels the T − 1 KLs share [0, 1) equally."""
        if continuous:
            schedule: Schedule = definition.schedule
            pieces = len(schedule.knots) - 1
            log_snr = np.interp(time * pieces, np.arange(pieces + 1), schedule.knots)
            slopes = -np.diff(schedule.knots) * pieces
            rate = slopes[np.minimum((time * pieces).astype(int), pieces - 1)]
        else:
            t = 2 + (time * (definition.levels.num_timesteps - 1)).astype(int)
            log_snr, rate = definition.levels.log_snr[t], definition.levels.gap[t]
        return cls(np.float32(log_snr), np.float32(rate), np.asarray(slot, np.int32))


class Rates(NamedTuple):
    """The integrand at `Points`, whose mean over uniform time is the diffusion term.

    Attributes:
      value: in nats.
      control: of mean zero over the noise, on the same scale (`diffusion.control`).
      eps_error: ‖ε − ε̂‖².
    """

    value: Float[Array, "b m"]
    control: Float[Array, "b m"]
    eps_error: Float[Array, "b m"]


def make_rates(
    config: ConfigDict, definition: ModelDefinition, mesh: Mesh, continuous: bool
) -> Callable[[Any, GaussianControl, Examples, Int[Array, "b"], Points, Int[Array, "b"]], Rates]:
    """The integrand as (params, control, examples, index [b], points, draw [b]) -> Rates.

    `draw` numbers independent noises of the same slots.
    """
    num_terms = max(definition.levels.num_timesteps - 1, 1)

    def rates(params, control, examples, index, points, draw):
        x_0 = definition.quantization.to_data(examples.images)
        noise = _rate_noise(config, definition, index, draw)
        reverse = definition.model(params, examples.labels).reverse

        def at(point):
            eps = noise(point.slot)
            if continuous:
                terms = continuous_rate(reverse, x_0, eps, point.log_snr, -point.rate)
                scale = 0.5 * point.rate
            else:
                terms = step_terms(reverse, x_0, eps, Step(point.log_snr, point.rate))
                terms = terms._replace(kl=num_terms * terms.kl)
                scale = 0.5 * num_terms * jnp.expm1(point.rate)
            return Rates(terms.kl, scale * control(x_0, eps, point.log_snr), terms.eps_error)

        m = points.slot.shape[1]
        chunk_size = min(config.evaluate.chunk_size, m)
        filled = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, -m % chunk_size)), "edge"), points)
        by_point = jax.tree.map(jnp.transpose, filled)
        found = jax.lax.map(at, by_point, batch_size=chunk_size)
        return jax.tree.map(lambda a: a[:m].T, found)

    return jit_evaluation(rates, mesh, num_batched=4, num_shared=2)


def make_log_ratios(
    config: ConfigDict, definition: ModelDefinition, mesh: Mesh
) -> Callable[..., Float[Array, "b m"]]:
    """T − 1 times (13.10)'s log-ratio at single steps; arguments as `make_rates`, but control."""
    num_terms = definition.levels.num_timesteps - 1

    def log_ratios(params, examples, index, points, draw):
        x_0 = definition.quantization.to_data(examples.images)
        noise = _rate_noise(config, definition, index, draw)
        reverse = definition.model(params, examples.labels).reverse

        def at(point):
            noises = noise(2 * point.slot), noise(2 * point.slot + 1)
            step = Step(point.log_snr, point.rate)
            return num_terms * step_log_ratio(reverse, x_0, *noises, step)[1]

        return jax.lax.map(at, jax.tree.map(jnp.transpose, points)).T

    return jit_evaluation(log_ratios, mesh, num_batched=4, num_shared=1)


def make_ends(
    config: ConfigDict, definition: ModelDefinition, mesh: Mesh
) -> Callable[..., tuple[Float[Array, "b"], Float[Array, "b m"]]]:
    """(params, levels, examples, index, draw [b], slot [b m]) -> prior [b], reconstruction."""

    def ends(params, levels, examples, index, draw, slot):
        x_0 = definition.quantization.to_data(examples.images)
        model = definition.model(params, examples.labels)._replace(levels=levels)
        noise = _rate_noise(config, definition, index, draw)

        def at(slot):
            return reconstruction(model, x_0, noise(ENDS_SLOT + slot))

        prior = prior_kl(x_0, levels.step(levels.num_timesteps * jnp.ones_like(index)).log_snr)
        return prior, jax.lax.map(at, slot.T).T

    return jit_evaluation(ends, mesh, num_batched=4)


def make_trajectory(
    config: ConfigDict, definition: ModelDefinition, mesh: Mesh
) -> Callable[..., Float[Array, "b"]]:
    """(13.10) along trajectories: (params, levels, examples, index, draw [b]) -> totals [b]."""

    def totals(params, levels, examples, index, draw):
        x_0 = definition.quantization.to_data(examples.images)
        noise = _rate_noise(config, definition, index, draw)
        model = definition.model(params, examples.labels)._replace(levels=levels)
        return trajectory(model, x_0, noise).total

    return jit_evaluation(totals, mesh, num_batched=3)


def make_ode(
    config: ConfigDict, definition: ModelDefinition, mesh: Mesh
) -> Callable[..., DiscreteBound]:
    """The ODE's bound: (params, levels, examples, index, draw [b]) -> DiscreteBound [b].

    The draw is the same for all rows. Solved `chunk_size` examples at a time: those that are solved
    together all take as many steps as the slowest.
    """
    settings, shape = config.evaluate.ode, definition.image_shape
    solver = Adaptive(settings.tolerance, settings.tolerance, settings.max_steps, settings.method)
    if settings.num_steps:
        solver = FixedGrid(settings.num_steps, settings.method)

    def run(params, levels, examples, index, draw):
        x_0 = definition.quantization.to_data(examples.images)
        model = definition.model(params, examples.labels)._replace(levels=levels)
        chunk_size = config.evaluate.chunk_size
        probes = None
        if settings.trace == "hutchinson":
            root = jax.random.fold_in(stream(config.seed, "probes"), draw[0])
            probes = example_probes(root, index, settings.probes, shape)
        if settings.dequantization == "uniform":
            keys = _example_keys(config, index, draw)
            u = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)
            spacing = definition.quantization.spacing
            y = x_0 + spacing * (u - 0.5)
            return uniform_dequantization(model, y, spacing, solver, probes, chunk_size)
        eps = _rate_noise(config, definition, index, draw)(jnp.zeros_like(index))
        return noise_dequantization(model, x_0, eps, solver, probes, chunk_size)

    return jit_evaluation(run, mesh, num_batched=3)


def evaluation_noise(
    config: ConfigDict, definition: ModelDefinition, index: Int[Array, "b"], draw: int = 0
) -> Callable:
    """The noise of an evaluation: a function of (seed, example, t, draw)."""
    return example_noise(stream(config.seed, "evaluate"), index, definition.image_shape, draw)


def _example_keys(config: ConfigDict, index: Int[Array, "b"], draw: Int[Array, "b"]) -> Array:
    """Keys [b], each a function of (seed, example, draw)."""
    root = stream(config.seed, "estimate")
    return jax.vmap(lambda i, d: jax.random.fold_in(jax.random.fold_in(root, i), d))(index, draw)


def _rate_noise(
    config: ConfigDict, definition: ModelDefinition, index: Int[Array, "b"], draw: Int[Array, "b"]
) -> Callable:
    """Noise of a stream of its own, a function of (seed, example, slot, draw)."""
    keys = _example_keys(config, index, draw)

    def noise(slot):
        at_slot = jax.vmap(jax.random.fold_in)(keys, slot)
        return jax.vmap(lambda k: jax.random.normal(k, definition.image_shape))(at_slot)

    return noise


def jit_evaluation(
    function: Callable, mesh: Mesh, num_batched: int, num_shared: int = 2
) -> Callable:
    """Compiles with full-precision products: what is shared everywhere, the rest by examples.

    Each device runs the function on its own examples, and nothing is communicated. Where several
    processes run together each gets all results, as NumPy's arrays.
    """
    split = PartitionSpec(mesh.axis_names)
    local = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(*[PartitionSpec()] * num_shared, *[split] * num_batched),
        out_specs=split,
        check_vma=False,
    )
    compiled = jax.jit(local)

    def run(*args):
        with jax.default_matmul_precision("highest"):
            made = compiled(*args)
        return made if jax.process_count() == 1 else devices.gather(made)

    return run
