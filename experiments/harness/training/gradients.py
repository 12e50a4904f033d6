"""The gradient of a training step's batch, whole or in parts.

Its random numbers are functions of (seed, step).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from experiments.harness import devices, seeds
from experiments.harness.data.splits import Examples
from experiments.harness.errors import ConfigError
from experiments.harness.training.loss import Batch, Inputs, LossFn, make_draw, make_loss
from experiments.harness.training.state import TrainingSetup, TrainState

LABELS = 2  # folded into a step's key: 0 and 1 give the keys that `split` gives
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
GATHERED = "gathered"


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


def make_gradients(
    setup: TrainingSetup,
) -> Callable[[seeds.Root, TrainState, Examples, Any], tuple[Batch, Any]]:
    """A step's losses and gradients, as (root, state, examples, indices) -> (Batch, gradients).

    Not compiled. The random numbers are functions of the root, `seeds.root` of the seed, and of the
    state's step. If the indices are None, the examples are the batch.
    """
    draws, (loss_fn, num_parts, mesh) = make_draws(setup), _loss_in_parts(setup)
    gradient = accumulate_gradients(loss_fn, num_parts, mesh)

    def gradients(root, state, examples, indices):
        return gradient(state.params, draws(root, state.step, examples, indices), state.history)

    return gradients


def make_part(setup: TrainingSetup) -> Callable[..., tuple[Batch, Any]]:
    """As `make_gradients`, of a part of the batch: (root, state, examples, indices, number)."""
    draws, gradient = make_draws(setup), part_gradient(*_loss_in_parts(setup))

    def part(root, state, examples, indices, number):
        inputs = draws(root, state.step, examples, indices)
        return gradient(state.params, inputs, state.history, number)

    return part


def _loss_in_parts(setup: TrainingSetup) -> tuple[LossFn, int, Mesh]:
    config, definition, _, mesh = setup
    definition = definition._replace(network=trained_network(config, definition.network))
    loss_fn = make_loss(config, definition)
    if mesh.shape.get("fsdp", 1) > 1:
        loss_fn = gather_params(loss_fn, mesh)
    return loss_fn, config.train.accumulate, mesh


def make_draws(setup: TrainingSetup) -> Callable[..., tuple[Inputs, Array]]:
    """A batch with its draws: (root, step, examples, indices) -> (Inputs, key for dropout)."""
    config, definition, _, mesh = setup
    draw = make_draw(config)

    def draws(root, step, examples, indices):
        if indices is not None:
            examples = jax.tree.map(lambda array: array[indices], examples)
        key = jax.random.fold_in(seeds.stream(root, "train"), step)
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
        return draw(loss_key, x_0, labels)

    return draws


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


def part_gradient(loss_fn: LossFn, num_parts: int, mesh: Mesh) -> Callable[..., tuple[Batch, Any]]:
    """The gradient of a part of a batch, as (params, draws, history, number) -> (Batch, gradients).

    An example has the same noise and time for any number of parts; each part draws its own dropout.
    A part has every num_parts-th example, so that it is spread over all devices evenly.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def of_part(params, draws, history, number):
        inputs, dropout_key = draws
        if num_parts > 1:
            inputs = jax.tree.map(
                lambda a: a.reshape(-1, num_parts, *a.shape[1:])[:, number], inputs
            )
            inputs = jax.lax.with_sharding_constraint(inputs, devices.split_batch(mesh))
            dropout_key = jax.random.fold_in(dropout_key, number)
        (_, batch), grads = gradient(params, inputs, dropout_key, history)
        return batch, grads

    return of_part


def join_parts(batches: Batch) -> Batch:
    """The losses of a batch from those of its parts, [parts, b / parts]."""
    return jax.tree.map(lambda a: a.T.reshape(-1), batches)


def accumulate_gradients(
    loss_fn: LossFn, num_parts: int, mesh: Mesh
) -> Callable[..., tuple[Batch, Any]]:
    """The gradient of a batch, as (params, draws, history) -> (Batch, gradients).

    The parts are processed one after another, and the gradient is the mean of theirs.
    """
    of_part = part_gradient(loss_fn, num_parts, mesh)

    def in_parts(params, draws, history):
        def add(total, number):
            batch, grads = of_part(params, draws, history, number)
            return jax.tree.map(jnp.add, total, grads), batch

        # In a compiled loop a CPU takes many times as long for a convolution's gradient.
        unroll = mesh.devices.flat[0].platform == "cpu"
        zero = jax.tree.map(jnp.zeros_like, params)
        total, batches = jax.lax.scan(add, zero, jnp.arange(num_parts), unroll=unroll)
        return join_parts(batches), jax.tree.map(lambda a: a / num_parts, total)

    return in_parts if num_parts > 1 else functools.partial(of_part, number=0)


def random_flip(key: Array, x_0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Mirrors each image left to right with probability ½."""
    mirrored = jax.random.bernoulli(key, shape=(x_0.shape[0], 1, 1, 1))
    return jnp.where(mirrored, x_0[:, :, ::-1], x_0)


def drop_labels(
    key: Array, labels: Int[Array, "b"], probability: float, num_classes: int
) -> Int[Array, "b"]:
    """Replaces each label, with this probability, by num_classes, which stands for no label."""
    return jnp.where(jax.random.bernoulli(key, probability, labels.shape), num_classes, labels)
