"""The train state: everything that a run has to save, as one pytree; and what it is made from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from experiments.harness import devices, seeds
from experiments.harness.processes import compilation
from experiments.harness.processes.shared_programs import share
from experiments.harness.setup.definition import ModelDefinition, define_model
from experiments.harness.setup.params import abstract_params, init_params
from experiments.harness.training.loss import init_history
from experiments.harness.training.optimizer import make_optimizer


class TrainingSetup(NamedTuple):
    """What a training step is compiled from.

    Attributes:
      config: the config.
      definition: the model that the config defines.
      optimizer: optax's.
      mesh: the devices.
    """

    config: ConfigDict
    definition: ModelDefinition
    optimizer: optax.GradientTransformation
    mesh: Mesh


def make_setup(config: ConfigDict) -> TrainingSetup:
    """The objects that the config names, on all devices.

    Raises:
      ConfigError: for a setting that is unknown or does not fit the others.
    """
    return TrainingSetup(config, define_model(config), make_optimizer(config), devices.mesh(config))


class Window(NamedTuple):
    """Sums over the steps since the last log line. They stay on the device until that line.

    Attributes:
      steps: number of training steps in the sums.
      loss: sum of the batches' mean losses.
      grad_norm: sum of the global gradient norms.
      quartile_loss: sum of the examples' losses, by quartile of t, (0, T/4] first.
      quartile_count: number of examples in each quartile.
      skipped_steps: number of steps since the start of the run that were skipped, because their
        loss, gradient or parameters were not finite; at most `train.skip_nonfinite`.
      first_bad_step: 1-based number of the first such step beyond that limit, else −1. From that
        step on the state does not change.
    """

    steps: Int[Array, ""]
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    quartile_loss: Float[Array, "4"]
    quartile_count: Float[Array, "4"]
    skipped_steps: Int[Array, ""]
    first_bad_step: Int[Array, ""]

    @classmethod
    def empty(cls) -> "Window":
        """A window of no steps. Each field has its own buffer, since the state is donated."""
        return cls(
            steps=jnp.int32(0),
            loss=jnp.zeros(()),
            grad_norm=jnp.zeros(()),
            quartile_loss=jnp.zeros(4),
            quartile_count=jnp.zeros(4),
            skipped_steps=jnp.int32(0),
            first_bad_step=jnp.int32(-1),
        )


class TrainState(NamedTuple):
    """What training carries from step to step.

    Attributes:
      step: number of steps taken.
      params: {"network": …}; a learned schedule adds "noise_schedule".
      ema_params: exponential moving average of the parameters; evaluation and sampling use it.
      opt_state: the optimizer's state.
      window: running sums for the log.
      history: `LossHistory` for importance sampling of t; without it an empty dictionary.
    """

    step: Int[Array, ""]
    params: Any
    ema_params: Any
    opt_state: Any
    window: Window
    history: Any


def init_state(
    params: Any, optimizer: optax.GradientTransformation, history: Any = None
) -> TrainState:
    """The state before the first step, from initial parameters."""
    ema_params = jax.tree.map(jnp.copy, params)  # a copy, since both are donated
    opt_state, history = optimizer.init(params), {} if history is None else history
    return TrainState(jnp.int32(0), params, ema_params, opt_state, Window.empty(), history)


def first_state(setup: TrainingSetup, load_params: Callable[[], Any] | None = None) -> TrainState:
    """The state of step 0 on the devices. Each device computes only its own part.

    Args:
      setup: what the run is made from.
      load_params: returns the initial parameters, on the devices; by default they are random.
    """
    config, definition, optimizer, _ = setup
    shardings = state_shardings(setup)

    def start(params):
        return init_state(params, optimizer, init_history(config, definition))

    if load_params is None:
        initial = jax.jit(
            lambda root: start(init_params(definition, root)),
            out_shardings=shardings,
            compiler_options=compilation.for_one_call(),
        )
        return share(initial)(seeds.root(config.seed))
    return share(jax.jit(start, out_shardings=shardings))(load_params())


def state_shardings(setup: TrainingSetup) -> TrainState:
    """The state's layout on the devices: a sharding for each array of the parameters and the
    optimizer, and one for the whole of each other field."""
    _, definition, optimizer, mesh = setup
    replicated, params = devices.replicated(mesh), abstract_params(definition)
    parts = devices.shard_params(mesh, (params, jax.eval_shape(optimizer.init, params)))
    return TrainState(replicated, parts[0], parts[0], parts[1], replicated, replicated)


def abstract_state(setup: TrainingSetup) -> TrainState:
    """Shapes, dtypes and shardings of the state, for the restoration of a checkpoint."""
    config, definition, optimizer, _ = setup
    params, history = abstract_params(definition), init_history(config, definition)
    shapes = jax.eval_shape(lambda params: init_state(params, optimizer, history), params)

    def with_sharding(sharding, tree):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    return jax.tree.map(with_sharding, state_shardings(setup), shapes)
