"""The compiled steps: one of training, and the two halves of an evaluation.

Random numbers are functions of (seed, step) in training and of (seed, example, t) in evaluation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from diffusion.bound import Bound, bound, prior_kl, reconstruction, terms_at
from diffusion.forward import example_noise
from diffusion.objectives import OBJECTIVES
from diffusion.samplers import Samples, ancestral, sample
from diffusion.timesteps import TIMESTEPS
from experiments.harness import devices
from experiments.harness.seeds import stream
from experiments.harness.settings import Problem
from experiments.harness.state import TrainState, Window

TrainStep = Callable[[TrainState, Any, Any], TrainState]


def make_train_step(
    config: ConfigDict, problem: Problem, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainStep:
    """One optimisation step as (state, images uint8 [n h w c], indices [b]) -> state.

    The state is donated. The images stay on the device and are indexed there.
    """
    objective = OBJECTIVES[config.train.objective]
    draw_timesteps = TIMESTEPS[config.train.timesteps]
    num_timesteps, decay = problem.levels.num_timesteps, config.train.ema_decay
    root = stream(config.seed, "train")

    def loss_fn(params, x_0, key):
        eps_key, t_key, dropout_key = jax.random.split(key, 3)
        eps = jax.random.normal(eps_key, x_0.shape)
        t = draw_timesteps(t_key, x_0.shape[0], num_timesteps)
        reverse = problem.reverse(params, dropout_key)
        losses = objective(reverse, problem.decoder, x_0, eps, t, problem.levels)
        return losses.mean(), (losses, t)

    def train_step(state, images, indices):
        key = jax.random.fold_in(root, state.step)
        flip_key, loss_key = jax.random.split(key)
        x_0 = problem.quantization.to_data(images[indices])
        x_0 = jax.lax.with_sharding_constraint(x_0, devices.split_batch(mesh))
        if config.data.flip:
            x_0 = random_flip(flip_key, x_0)
        (_, (losses, t)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, x_0, loss_key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        ema_params = optax.incremental_update(params, state.ema_params, 1 - rate)
        restart = state.step % config.train.log_every == 0
        window = _update_window(
            state.window, restart, state.step, losses, t / num_timesteps, optax.tree.norm(grads)
        )
        return TrainState(state.step + 1, params, ema_params, opt_state, window)

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


def _update_window(
    window: Window,
    restart: Array,
    step: Array,
    losses: Float[Array, "b"],
    time: Float[Array, "b"],
    grad_norm: Array,
) -> Window:
    """Adds a batch, unless a step has been bad; `time` is t/T in (0, 1]."""
    frozen = window.first_bad_step >= 0
    fresh = Window.empty()._replace(first_bad_step=window.first_bad_step)
    old, window = window, jax.tree.map(lambda a, b: jnp.where(restart, a, b), fresh, window)
    quartile = jnp.ceil(4 * time).astype(jnp.int32) - 1
    loss = losses.mean()
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm)) & (window.first_bad_step < 0)
    new = Window(
        steps=window.steps + 1,
        loss=window.loss + loss,
        grad_norm=window.grad_norm + grad_norm,
        quartile_loss=window.quartile_loss.at[quartile].add(losses),
        quartile_count=window.quartile_count.at[quartile].add(1.0),
        first_bad_step=jnp.where(bad, step + 1, window.first_bad_step),
    )
    return jax.tree.map(lambda a, b: jnp.where(frozen, a, b), old, new)


def make_bound(
    config: ConfigDict, problem: Problem, mesh: Mesh
) -> Callable[[Any, Array, Int[Array, "b"]], Bound]:
    """The full-sum bound as (params, images uint8 [b h w c], index [b]) -> Bound [b]."""

    def full(params, images, index):
        x_0 = problem.quantization.to_data(images)
        noise = evaluation_noise(config, problem, index)
        return bound(
            problem.reverse(params),
            problem.decoder,
            x_0,
            problem.levels,
            noise,
            config.evaluate.chunk_size,
        )

    return _jit_evaluation(full, mesh, num_batched=2)


def make_terms_at(
    config: ConfigDict, problem: Problem, mesh: Mesh, draw: int
) -> Callable[..., Bound]:
    """The bound at some timesteps: (params, images, index [b], t [b m]) -> Bound, KLs [b m].

    Args:
      config: the config.
      problem: the mathematics it names.
      mesh: the devices.
      draw: which of an example's independent noises; the full bound uses 0.
    """

    def some(params, images, index, t):
        x_0 = problem.quantization.to_data(images)
        noise = evaluation_noise(config, problem, index, draw)
        reverse, levels = problem.reverse(params), problem.levels
        ones = jnp.ones_like(index)
        terms = terms_at(reverse, x_0, levels, t, noise, config.evaluate.chunk_size)
        return Bound(
            prior=prior_kl(x_0, levels.step(levels.num_timesteps * ones).log_snr),
            kl=terms.kl,
            reconstruction=reconstruction(reverse, problem.decoder, x_0, noise(ones), levels),
            eps_error=terms.eps_error,
        )

    return _jit_evaluation(some, mesh, num_batched=3)


def make_sampler(
    config: ConfigDict,
    problem: Problem,
    mesh: Mesh,
    num_timesteps: int,
    record: tuple[int, ...] = (),
) -> Callable[[Any, Int[Array, "b"]], Samples]:
    """Ancestral sampling as (params, index [b]) -> Samples, one compiled program.

    Sample i is a function of (seed, i), whatever the batch around it.

    Args:
      config: the config.
      problem: the mathematics it names.
      mesh: the devices.
      num_timesteps: levels to step through; the schedule is respaced to them.
      record: levels whose x_t and x̂_0 are kept.
    """
    levels = problem.schedule.levels(num_timesteps)
    root = stream(config.seed, "sample")

    def run(params, index):
        noise = example_noise(root, index, problem.image_shape)
        sampler = ancestral(problem.reverse(params), config.sample.x_0_treatment)
        return sample(sampler, levels, noise, len(index), record)

    everywhere, split = devices.replicated(mesh), devices.split_batch(mesh)
    out = Samples(split, *[NamedSharding(mesh, PartitionSpec(None, "data"))] * 2)
    return jax.jit(run, in_shardings=(everywhere, split), out_shardings=out)


def evaluation_noise(
    config: ConfigDict, problem: Problem, index: Int[Array, "b"], draw: int = 0
) -> Callable:
    """The noise of an evaluation: a function of (seed, example, t, draw)."""
    return example_noise(stream(config.seed, "evaluate"), index, problem.image_shape, draw)


def _jit_evaluation(function: Callable, mesh: Mesh, num_batched: int) -> Callable:
    """Compiles with full-precision products: parameters everywhere, the rest split by examples.

    Each device runs the function on its own examples, and nothing is communicated.
    """
    split = PartitionSpec("data")
    local = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), *[split] * num_batched),
        out_specs=split,
        check_vma=False,
    )
    compiled = jax.jit(local)

    def run(*args):
        with jax.default_matmul_precision("highest"):
            return compiled(*args)

    return run
