"""The compiled training step. Its random numbers are functions of (seed, step)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from experiments.harness import devices
from experiments.harness.data import Examples
from experiments.harness.loss import Batch, make_loss
from experiments.harness.seeds import stream
from experiments.harness.settings import Problem
from experiments.harness.state import TrainState, Window

TrainStep = Callable[[TrainState, Examples, Any], TrainState]
LABELS = 2  # folded into a step's key: 0 and 1 would be the two that it is split into


def make_train_step(
    config: ConfigDict, problem: Problem, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainStep:
    """One optimisation step as (state, examples of the whole set, indices [b]) -> state.

    The state is donated. The examples stay on the device and are indexed there.
    """
    loss_fn = make_loss(config, problem)
    by_history, decay = config.train.timesteps == "importance", config.train.ema_decay
    root = stream(config.seed, "train")

    def train_step(state, examples, indices):
        key = jax.random.fold_in(root, state.step)
        flip_key, loss_key = jax.random.split(key)
        x_0 = problem.quantization.to_data(examples.images[indices])
        x_0 = jax.lax.with_sharding_constraint(x_0, devices.split_batch(mesh))
        labels = None
        if problem.num_classes:
            labels = examples.labels[indices]
            labels = jax.lax.with_sharding_constraint(labels, devices.split_batch(mesh))
            share, label_key = config.train.label_dropout, jax.random.fold_in(key, LABELS)
            labels = withhold(label_key, labels, share, problem.num_classes)
        if config.data.flip:
            x_0 = random_flip(flip_key, x_0)
        (_, batch), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, x_0, loss_key, state.history, labels
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        ema_params = optax.incremental_update(params, state.ema_params, 1 - rate)
        restart = state.step % config.train.log_every == 0
        window = _update_window(state.window, restart, state.step, batch, optax.tree.norm(grads))
        history = state.history
        if by_history:
            history = history.update(batch.t, batch.unweighted)
        return TrainState(state.step + 1, params, ema_params, opt_state, window, history)

    everywhere = devices.replicated(mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(everywhere, everywhere, devices.split_batch(mesh)),
        out_shardings=everywhere,
    )


def random_flip(key: Array, x_0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Each image mirrored left to right with probability ½."""
    mirrored = jax.random.bernoulli(key, shape=(x_0.shape[0], 1, 1, 1))
    return jnp.where(mirrored, x_0[:, :, ::-1], x_0)


def withhold(
    key: Array, labels: Int[Array, "b"], probability: float, num_classes: int
) -> Int[Array, "b"]:
    """Each label replaced with this probability by num_classes, which is no label."""
    return jnp.where(jax.random.bernoulli(key, probability, labels.shape), num_classes, labels)


def _update_window(
    window: Window,
    restart: Array,
    step: Array,
    batch: Batch,
    grad_norm: Array,
) -> Window:
    """Adds a batch, unless a step has been bad."""
    frozen = window.first_bad_step >= 0
    fresh = Window.empty()._replace(first_bad_step=window.first_bad_step)
    old, window = window, jax.tree.map(lambda a, b: jnp.where(restart, a, b), fresh, window)
    quartile = jnp.ceil(4 * batch.time).astype(jnp.int32) - 1
    loss = batch.losses.mean()
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm)) & (window.first_bad_step < 0)
    new = Window(
        steps=window.steps + 1,
        loss=window.loss + loss,
        grad_norm=window.grad_norm + grad_norm,
        quartile_loss=window.quartile_loss.at[quartile].add(batch.unweighted),
        quartile_count=window.quartile_count.at[quartile].add(1.0),
        first_bad_step=jnp.where(bad, step + 1, window.first_bad_step),
    )
    return jax.tree.map(lambda a, b: jnp.where(frozen, a, b), old, new)
