"""The compiled training step. Its random numbers are functions of (seed, step)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from experiments.harness import devices
from experiments.harness.data.splits import Examples
from experiments.harness.errors import ConfigError
from experiments.harness.seeds import stream
from experiments.harness.setup.definition import ModelDefinition
from experiments.harness.training.loss import Batch, LossFn, make_draw, make_loss
from experiments.harness.training.state import (
    TrainingSetup,
    TrainState,
    Window,
    state_shardings,
)

TrainStep = Callable[[TrainState, Examples, Any], TrainState]
LABELS = 2  # folded into a step's key: 0 and 1 give the keys that `split` gives
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
GATHERED = "gathered"


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


def trained_network(config: ConfigDict, network: nn.Module) -> nn.Module:
    """The network with the config's `model.dtype` and `model.remat`, for the same parameters.

    Evaluation and sampling use the network without them: in float32.

    Raises:
      ConfigError: for a network without these fields.
    """
    dtype = DTYPES[config.model.dtype]
    if dtype is None and not config.model.remat:
        return network
    try:
        return network.clone(dtype=dtype, remat=config.model.remat)
    except TypeError as error:
        raise ConfigError(
            f"config.model.name = {config.model.name!r} has no config.model.dtype or remat; use "
            "float32 and False"
        ) from error


def make_train_step(setup: TrainingSetup, streamed: bool = False) -> TrainStep:
    """One optimisation step as (state, examples of the whole set, indices [b]) -> state.

    The state is donated. The examples stay on the device and are indexed there. With
    `train.steps_per_dispatch` = k > 1 it takes k steps, and the indices are [k, b].

    Args:
      setup: config, model, optimizer and devices.
      streamed: whether the examples are a batch, split over the devices, and the indices None; with
        k > 1 their first axis is k.
    """
    train_step, mesh = _make_one_step(setup), setup.mesh
    is_scanned = setup.config.train.steps_per_dispatch > 1

    def train_steps(state, examples, indices):
        def step(state, batch):
            return train_step(state, *(batch if streamed else (examples, batch))), None

        return jax.lax.scan(step, state, (examples, indices) if streamed else indices)[0]

    replicated, state_sharding = devices.replicated(mesh), state_shardings(setup)
    batch = devices.split_batch(mesh, leading=int(is_scanned))
    return jax.jit(
        train_steps if is_scanned else train_step,
        donate_argnums=0,
        in_shardings=(state_sharding, batch if streamed else replicated, batch),
        out_shardings=state_sharding,
    )


def _make_one_step(setup: TrainingSetup) -> TrainStep:
    """A single step, not compiled."""
    config, _, optimizer, _ = setup
    gradients = make_gradients(setup)
    follows_losses, decay = config.train.timesteps == "importance", config.train.ema_decay

    def train_step(state, examples, indices):
        batch, grads = gradients(state, examples, indices)
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

    return train_step


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


def make_gradients(
    setup: TrainingSetup,
) -> Callable[[TrainState, Examples, Any], tuple[Batch, Any]]:
    """The losses and gradients of a step, as (state, examples, indices) -> (Batch, gradients).

    Not compiled. The random numbers are functions of the seed and the state's step. If the indices
    are None, the examples are the batch.
    """
    config, definition, _, mesh = setup
    definition = definition._replace(network=trained_network(config, definition.network))
    draw, loss_fn = make_draw(config), make_loss(config, definition)
    if mesh.shape.get("fsdp", 1) > 1:
        loss_fn = gather_params(loss_fn, mesh)
    value_and_gradient = accumulate_gradients(loss_fn, config.train.accumulate, mesh)
    seed_key = stream(config.seed, "train")

    def gradients(state, examples, indices):
        if indices is not None:
            examples = jax.tree.map(lambda array: array[indices], examples)
        key = jax.random.fold_in(seed_key, state.step)
        flip_key, loss_key = jax.random.split(key)
        x_0 = definition.to_data(examples.images)
        x_0 = jax.lax.with_sharding_constraint(x_0, devices.split_batch(mesh))
        labels = None
        if definition.num_classes:
            labels = jax.lax.with_sharding_constraint(examples.labels, devices.split_batch(mesh))
            share, label_key = config.train.label_dropout, jax.random.fold_in(key, LABELS)
            labels = drop_labels(label_key, labels, share, definition.num_classes)
        if config.data.flip:
            x_0 = random_flip(flip_key, x_0)
        inputs, dropout_key = draw(loss_key, x_0, labels)
        return value_and_gradient(state.params, inputs, dropout_key, state.history)

    return gradients


def gather_params(loss_fn: LossFn, mesh: Mesh) -> LossFn:
    """The same loss, of parameters that are split over devices.

    They are gathered where they are used, and gathered again for the gradient instead of stored.
    """

    def gathered(params, *args):
        params = jax.lax.with_sharding_constraint(params, devices.replicated(mesh))
        params = jax.tree.map(lambda leaf: checkpoint_name(leaf, GATHERED), params)
        return loss_fn(params, *args)

    policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
    return jax.checkpoint(gathered, policy=policy)


def accumulate_gradients(
    loss_fn: LossFn, num_parts: int, mesh: Mesh
) -> Callable[..., tuple[Batch, Any]]:
    """The gradient as (params, inputs, dropout_key, history) -> (Batch, gradients).

    The batch is processed in parts, one after another, and the gradient is the mean of theirs. An
    example has the same noise and time for any number of parts; each part draws its own dropout.
    A part has every num_parts-th example, so that it is spread over all devices evenly.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def whole_batch(*args):
        (_, batch), grads = gradient(*args)
        return batch, grads

    def in_parts(params, inputs, dropout_key, history):
        def add(total, number):
            part = jax.tree.map(lambda a: a.reshape(-1, num_parts, *a.shape[1:])[:, number], inputs)
            part = jax.lax.with_sharding_constraint(part, devices.split_batch(mesh))
            key = jax.random.fold_in(dropout_key, number)
            (_, batch), grads = gradient(params, part, key, history)
            return jax.tree.map(jnp.add, total, grads), batch

        # In a compiled loop a CPU takes many times as long for a convolution's gradient.
        unroll = mesh.devices.flat[0].platform == "cpu"
        zero = jax.tree.map(jnp.zeros_like, params)
        total, batches = jax.lax.scan(add, zero, jnp.arange(num_parts), unroll=unroll)
        batch = jax.tree.map(lambda a: a.T.reshape(-1), batches)
        return batch, jax.tree.map(lambda a: a / num_parts, total)

    return whole_batch if num_parts == 1 else in_parts


def random_flip(key: Array, x_0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Mirrors each image left to right with probability ½."""
    mirrored = jax.random.bernoulli(key, shape=(x_0.shape[0], 1, 1, 1))
    return jnp.where(mirrored, x_0[:, :, ::-1], x_0)


def drop_labels(
    key: Array, labels: Int[Array, "b"], probability: float, num_classes: int
) -> Int[Array, "b"]:
    """Replaces each label, with this probability, by num_classes, which stands for no label."""
    return jnp.where(jax.random.bernoulli(key, probability, labels.shape), num_classes, labels)


def quartile_of(time: Float[Array, "b"]) -> Int[Array, "b"]:
    """The quarter of (0, 1] that each time is in, numbered from 0."""
    return jnp.ceil(4 * time).astype(jnp.int32) - 1
