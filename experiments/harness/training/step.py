"""The compiled training step. Its random numbers are functions of (seed, step)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from experiments.harness import devices, seeds
from experiments.harness.data.splits import Examples
from experiments.harness.errors import ConfigError
from experiments.harness.processes import cores
from experiments.harness.processes.shared_programs import compile_once
from experiments.harness.setup.definition import ModelDefinition
from experiments.harness.setup.params import abstract_params
from experiments.harness.training.gradients import (
    join_parts,
    make_gradients,
    make_part,
    trained_network,
)
from experiments.harness.training.loss import Batch
from experiments.harness.training.packing import Packing
from experiments.harness.training.speed import count_flops
from experiments.harness.training.state import TrainingSetup, TrainState, Window

SMALL_NETWORK = 5_000_000  # parameters, up to which a core for each part of a batch is faster


def check(config: ConfigDict, definition: ModelDefinition) -> None:
    """Raises ConfigError for settings of the step that fit neither data, devices nor network."""
    devices.mesh(config)
    train, decoder = config.train, config.decoder
    if config.data.flip and not definition.are_images:
        raise ConfigError("config.data.flip = True, but the data are no images; use False")
    if (
        (train.time, train.objective) == ("continuous", "vlb")
        and definition.quantization is not None
        and (decoder.name, decoder.discretized_gaussian.variance)
        == ("discretized_gaussian", "beta_tilde")
    ):
        raise ConfigError(
            "config.decoder.discretized_gaussian.variance = 'beta_tilde'; it depends on T; in "
            "continuous time use beta"
        )
    devices.check_batch("config.train.batch_size", train.batch_size, train.accumulate)
    trained_network(config, definition.network)
    if train.steps_per_dispatch > 1 and jax.default_backend() == "cpu":
        raise ConfigError(
            f"config.train.steps_per_dispatch = {train.steps_per_dispatch} is for accelerators: in "
            "a loop that is compiled for a CPU a convolution's gradient takes many times as long; "
            "use 1"
        )


def make_train_step(setup: TrainingSetup, streamed: bool = False) -> "WholeStep | StepInParts":
    """One optimisation step as (state, examples of the whole set, indices [b]) -> state.

    The state is one that the step's `packing.pack` gave, and is donated; `packing.unpack` gives it
    back as a tree. The examples stay on the device and are indexed there. With
    `train.steps_per_dispatch` = k > 1 it takes k steps, and the indices are [k, b].

    The seed's key, `seeds.root`, is an argument of its programs and lies on the devices, so that
    runs of other seeds can share them.

    Args:
      setup: config, model, optimizer and devices.
      streamed: whether the examples are a batch, split over the devices, and the indices None; with
        k > 1 their first axis is k.
    """
    if _gains_from_cores(setup):
        return StepInParts(setup)
    mesh, packing = setup.mesh, Packing(setup)
    train_step = _make_one_step(setup, packing)
    is_scanned = setup.config.train.steps_per_dispatch > 1

    def train_steps(root, state, examples, indices):
        def step(state, batch):
            return train_step(root, state, *(batch if streamed else (examples, batch))), None

        return jax.lax.scan(step, state, (examples, indices) if streamed else indices)[0]

    replicated, state_sharding = devices.replicated(mesh), packing.shardings
    batch = devices.split_batch(mesh, leading=int(is_scanned))
    jitted = jax.jit(
        train_steps if is_scanned else train_step,
        donate_argnums=1,
        in_shardings=(replicated, state_sharding, batch if streamed else replicated, batch),
        out_shardings=state_sharding,
    )
    return WholeStep(jitted, _root(setup), packing)


def _gains_from_cores(setup: TrainingSetup) -> bool:
    """Whether the parts of a batch are computed at once: all of them, and of a small network.

    The operations of a large one occupy all cores by themselves, and its parts are for memory.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(setup.definition)))
    return 1 < setup.config.train.accumulate <= cores.num_cores() and size <= SMALL_NETWORK


def _root(setup: TrainingSetup) -> jax.Array:
    """The seed's key on the devices."""
    return devices.place(seeds.root(setup.config.seed), devices.replicated(setup.mesh))


class WholeStep:
    """A step that is one program, of (root, state, examples, indices)."""

    def __init__(self, program: Any, root: jax.Array, packing: Packing):
        self.program, self._root, self.packing = program, root, packing

    def __call__(self, state: TrainState, examples: Examples, indices: Any) -> TrainState:
        return self.program(self._root, state, examples, indices)

    def lower(self, *batch: Any) -> jax.stages.Lowered:
        """The program for (state, examples, indices), not compiled."""
        return self.program.lower(self._root, *batch)

    def compile(self, *batch: Any) -> float:
        """Compiles it for (state, examples, indices); returns a call's operations."""
        args = self._root, *batch
        traced = self.program.trace(*args)
        self.program = compile_once(traced.lower(), args)
        return count_flops(traced.jaxpr)


class StepInParts:
    """A step on a CPU that computes the parts of its batch at once, each on a core.

    It has two programs: the gradient of a part, and what is done with the mean of the gradients.
    """

    def __init__(self, setup: TrainingSetup):
        self._root, self._numbers = _root(setup), np.arange(setup.config.train.accumulate)
        self.packing = Packing(setup)
        finish, num_parts = _make_finish(setup), len(self._numbers)

        def join(state, parts):
            batches, grads = zip(*parts, strict=True)
            batch = join_parts(jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches))
            return finish(state, batch, jax.tree.map(lambda *g: sum(g) / num_parts, *grads))

        self._part = jax.jit(self.packing.of_gradients(make_part(setup)))
        self._join = jax.jit(join, donate_argnums=0, out_shardings=self.packing.shardings)

    def __call__(self, state: TrainState, examples: Examples, indices: Any) -> TrainState:
        batch = self._root, state, examples, indices
        return self._join(state, cores.at_once(lambda n: self._part(*batch, n), self._numbers))

    def compile(self, *batch: Any) -> float:
        """Compiles both programs for (state, examples, indices), as `WholeStep.compile`."""
        part_args = self._root, *batch, self._numbers[0]
        part = self._part.trace(*part_args)
        join_args = batch[0], [part.out_info] * len(self._numbers)
        join = self._join.trace(*join_args)
        lowered = part.lower(), join.lower()  # here, since a thread has other settings of JAX
        self._part, self._join = cores.at_once(compile_once, lowered, [part_args, join_args])
        return len(self._numbers) * count_flops(part.jaxpr) + count_flops(join.jaxpr)


def _make_one_step(setup: TrainingSetup, packing: Packing) -> Callable[..., TrainState]:
    """A single step as (root, state, examples, indices) -> state, not compiled."""
    gradients, finish = packing.of_gradients(make_gradients(setup)), _make_finish(setup)
    return lambda root, state, *batch: finish(state, *gradients(root, state, *batch))


def _make_finish(setup: TrainingSetup) -> Callable[[TrainState, Batch, Any], TrainState]:
    """What a step does with its losses and gradients; not compiled."""
    config, _, optimizer, _ = setup
    follows_losses, decay = config.train.timesteps == "importance", config.train.ema_decay

    def finish(state, batch, grads):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        ema_params = optax.incremental_update(params, state.ema_params, 1 - rate)
        window, is_bad = _update_window(config.train, state, batch, grads, params)
        history = state.history
        if follows_losses:
            history = history.update(batch.t, batch.unweighted)
        # A bad step changes nothing. After one that may not be skipped nothing changes any more.
        stopped = window.first_bad_step >= 0
        old = state.params, state.ema_params, state.opt_state, state.history
        params, ema_params, opt_state, history = jax.tree.map(
            lambda a, b: jnp.where(is_bad | stopped, a, b),
            old,
            (params, ema_params, opt_state, history),
        )
        step = jnp.where(stopped, state.step, state.step + 1)
        return TrainState(step, params, ema_params, opt_state, window, history)

    return finish


def _update_window(
    train: ConfigDict, state: TrainState, batch: Batch, grads: Any, params: Any
) -> tuple[Window, Array]:
    """Adds a step to the log's sums, or counts it as bad.

    Args:
      train: the section `train` of the config.
      state: the state before the step.
      batch: the step's losses.
      grads: its gradients.
      params: the parameters after it.

    Returns:
      The window after the step, and whether a loss, gradient or parameter of it is not finite.
    """
    restart = state.step % train.log_every == 0
    grad_norm = optax.tree.norm(grads)
    is_bad = ~_all_finite((batch.losses.mean(), grad_norm, params))
    is_stopped = state.window.first_bad_step >= 0
    empty = Window.empty()._replace(
        first_bad_step=state.window.first_bad_step, skipped_steps=state.window.skipped_steps
    )
    window = jax.tree.map(lambda a, b: jnp.where(restart, a, b), empty, state.window)
    quartile = quartile_of(batch.time)
    good = window._replace(
        steps=window.steps + 1,
        loss=window.loss + batch.losses.mean(),
        grad_norm=window.grad_norm + grad_norm,
        quartile_loss=window.quartile_loss.at[quartile].add(batch.unweighted),
        quartile_count=window.quartile_count.at[quartile].add(1.0),
    )
    may_skip = window.skipped_steps < train.skip_nonfinite
    bad = window._replace(
        skipped_steps=window.skipped_steps + may_skip,
        first_bad_step=jnp.where(may_skip, window.first_bad_step, state.step + 1),
    )
    new = jax.tree.map(lambda a, b: jnp.where(is_bad, a, b), bad, good)
    return jax.tree.map(lambda a, b: jnp.where(is_stopped, a, b), state.window, new), is_bad


def _all_finite(tree: Any) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def quartile_of(time: Float[Array, "b"]) -> Int[Array, "b"]:
    """The quarter of (0, 1] that each time is in, numbered from 0."""
    return jnp.ceil(4 * time).astype(jnp.int32) - 1
