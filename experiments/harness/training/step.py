"""The compiled training step. Its random numbers are functions of (seed, step)."""

import functools
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
from experiments.harness.training.loss import Batch, LossFn, make_loss, whole
from experiments.harness.training.state import (
    TrainingSetup,
    TrainState,
    Window,
    state_shardings,
)

TrainStep = Callable[[TrainState, Examples, Any], TrainState]
LABELS = 2  # folded into a step's key: 0 and 1 would be the two that it is split into
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
GATHERED = "gathered"


def check(config: ConfigDict, definition: ModelDefinition) -> None:
    """Raises ConfigError for settings of the step that do not fit the devices or the network."""
    devices.mesh(config)
    train = config.train
    devices.check_batch("config.train.batch_size", train.batch_size, train.accumulate)
    trained_network(config, definition.network)
    if train.steps_per_dispatch > 1 and jax.default_backend() == "cpu":
        raise ConfigError(
            f"config.train.steps_per_dispatch = {train.steps_per_dispatch} is for accelerators: in "
            "a loop that is compiled for a CPU a convolution's gradient takes many times as long; "
            "use 1"
        )


def trained_network(config: ConfigDict, network: nn.Module) -> nn.Module:
    """The network as it is trained: `model.dtype` and `model.remat`. Its parameters are the same.

    Raises:
      ConfigError: for a network that has only one way to compute.
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
        restart = state.step % config.train.log_every == 0
        grad_norm = optax.tree.norm(grads)
        is_bad = ~_all_finite((batch.losses.mean(), grad_norm, params))
        window = _update_window(
            state.window, restart, state.step, batch, grad_norm, is_bad, config.train.skip_nonfinite
        )
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


def make_gradients(
    setup: TrainingSetup,
) -> Callable[[TrainState, Examples, Any], tuple[Batch, Any]]:
    """What a step is made of, as (state, examples, indices) -> the batch's losses, its gradients.

    Not compiled; a function of the state's step as the step itself is. Without indices the examples
    are the batch.
    """
    config, definition, _, mesh = setup
    definition = definition._replace(network=trained_network(config, definition.network))
    loss_fn, root = make_loss(config, definition), stream(config.seed, "train")
    if mesh.shape.get("fsdp", 1) > 1:
        loss_fn = gathering(loss_fn, mesh)
    value_and_gradient = accumulated(loss_fn, config.train.accumulate, mesh)

    def gradients(state, examples, indices):
        if indices is not None:
            examples = jax.tree.map(lambda of: of[indices], examples)
        key = jax.random.fold_in(root, state.step)
        flip_key, loss_key = jax.random.split(key)
        x_0 = definition.quantization.to_data(examples.images)
        x_0 = jax.lax.with_sharding_constraint(x_0, devices.split_batch(mesh))
        labels = None
        if definition.num_classes:
            labels = jax.lax.with_sharding_constraint(examples.labels, devices.split_batch(mesh))
            share, label_key = config.train.label_dropout, jax.random.fold_in(key, LABELS)
            labels = withhold(label_key, labels, share, definition.num_classes)
        if config.data.flip:
            x_0 = random_flip(flip_key, x_0)
        return value_and_gradient(state.params, x_0, loss_key, state.history, labels)

    return gradients


def gathering(loss_fn: LossFn, mesh: Mesh) -> LossFn:
    """A loss of parameters that are split over devices: whole only while they are used.

    What was gathered is not kept for the gradient, but gathered again.
    """

    def gathered(params, *args, part=whole):
        params = jax.lax.with_sharding_constraint(params, devices.replicated(mesh))
        params = jax.tree.map(lambda leaf: checkpoint_name(leaf, GATHERED), params)
        return loss_fn(params, *args, part=part)

    def run(params, *args, part=whole):
        policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
        return jax.checkpoint(functools.partial(gathered, part=part), policy=policy)(params, *args)

    return run


def accumulated(loss_fn: LossFn, parts: int, mesh: Mesh) -> Callable[..., tuple[Batch, Any]]:
    """A loss's gradient as (params, x_0, key, history, labels) -> Batch, gradients.

    Of a batch in several parts, one after another, it is the mean of theirs: that of the whole
    batch but for rounding, with the same random numbers for each example. Every so many examples
    make a part, so that each device has as many of each.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def at_once(*args):
        (_, batch), grads = gradient(*args)
        return batch, grads

    if parts == 1:
        return at_once

    def in_parts(params, *args):
        def add(total, number):
            def part(tree):
                rows = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:])[:, number], tree)
                return jax.lax.with_sharding_constraint(rows, devices.split_batch(mesh))

            with nn.intercept_methods(dropping_from_all(parts, part)):
                (_, batch), grads = gradient(params, *args, part=part)
            return jax.tree.map(jnp.add, total, grads), batch

        # Within a loop a CPU takes many times as long for a convolution's gradient.
        unroll = mesh.devices.flat[0].platform == "cpu"
        zero = jax.tree.map(jnp.zeros_like, params)
        total, batches = jax.lax.scan(add, zero, jnp.arange(parts), unroll=unroll)
        batch = jax.tree.map(lambda a: a.T.reshape(-1), batches)
        return batch, jax.tree.map(lambda a: a / parts, total)

    return in_parts


def dropping_from_all(parts: int, part: Callable[[Any], Any]) -> Callable:
    """For `nn.intercept_methods`: dropout with the random numbers that the whole batch would have.

    It is applied to a batch of which the part is as it was, and the rest is dropped again.
    """

    def intercept(method, args, kwargs, context):
        if not isinstance(context.module, nn.Dropout):
            return method(*args, **kwargs)
        x, *others = args
        return part(method(jnp.repeat(x, parts, axis=0), *others, **kwargs))

    return intercept


def random_flip(key: Array, x_0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Each image mirrored left to right with probability ½."""
    mirrored = jax.random.bernoulli(key, shape=(x_0.shape[0], 1, 1, 1))
    return jnp.where(mirrored, x_0[:, :, ::-1], x_0)


def withhold(
    key: Array, labels: Int[Array, "b"], probability: float, num_classes: int
) -> Int[Array, "b"]:
    """Each label replaced with this probability by num_classes, which is no label."""
    return jnp.where(jax.random.bernoulli(key, probability, labels.shape), num_classes, labels)


def quartile_of(time: Float[Array, "b"]) -> Int[Array, "b"]:
    """Which quarter of (0, 1] each time is in, from 0."""
    return jnp.ceil(4 * time).astype(jnp.int32) - 1


def _all_finite(tree: Any) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _update_window(
    window: Window,
    restart: Array,
    step: Array,
    batch: Batch,
    grad_norm: Array,
    is_bad: Array,
    max_skipped: int,
) -> Window:
    """Adds a batch; or counts a bad step, and remembers the first that is one too many."""
    frozen = window.first_bad_step >= 0
    fresh = Window.empty()._replace(
        first_bad_step=window.first_bad_step, skipped_steps=window.skipped_steps
    )
    old, window = window, jax.tree.map(lambda a, b: jnp.where(restart, a, b), fresh, window)
    quartile = quartile_of(batch.time)
    good = window._replace(
        steps=window.steps + 1,
        loss=window.loss + batch.losses.mean(),
        grad_norm=window.grad_norm + grad_norm,
        quartile_loss=window.quartile_loss.at[quartile].add(batch.unweighted),
        quartile_count=window.quartile_count.at[quartile].add(1.0),
    )
    skips = window.skipped_steps < max_skipped
    bad = window._replace(
        skipped_steps=window.skipped_steps + skips,
        first_bad_step=jnp.where(skips, window.first_bad_step, step + 1),
    )
    new = jax.tree.map(lambda a, b: jnp.where(is_bad, a, b), bad, good)
    return jax.tree.map(lambda a, b: jnp.where(frozen, a, b), old, new)
