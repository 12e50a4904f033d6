"""A description of a training step that is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from experiments.harness import devices, seeds
from experiments.harness.data.splits import Examples
from experiments.harness.training.gradients import make_gradients
from experiments.harness.training.state import TrainingSetup, TrainState
from experiments.harness.training.step import quartile_of

_MODULES_SHOWN = 8


def describe_bad_step(
    setup: TrainingSetup,
    state: TrainState,
    examples: Examples,
    indices: Int[Array | np.ndarray, "b"] | None,
) -> str:
    """One line on the losses and gradients of a step, which are computed again.

    Args:
      setup: what the step was compiled from.
      state: the state before the step.
      examples: the examples, as the step takes them.
      indices: the batch's, or None if the examples are the batch.
    """

    def measure(root, state, examples, indices):
        batch, grads = make_gradients(setup)(root, state, examples, indices)
        quartile = quartile_of(batch.time)
        sums = jnp.zeros(4).at[quartile].add(batch.unweighted)
        means = sums / jnp.zeros(4).at[quartile].add(1.0)  # NaN without examples
        norms = {
            name if part == "network" else f"{part}/{name}": optax.tree.norm(module)
            for part, tree in grads.items()
            for name, module in tree.items()
        }
        return batch.losses.mean(), means, norms

    compiled = jax.jit(measure, out_shardings=devices.replicated(setup.mesh))
    root = seeds.root(setup.config.seed)
    loss, means, norms = jax.device_get(compiled(root, state, examples, indices))
    if not np.isfinite(loss):
        quantity = "the loss"
    elif not all(np.isfinite(norm) for norm in norms.values()):
        quantity = "the gradient"
    else:
        quantity = "the updated parameter"
    # The largest norms first, with infinite and undefined ones before all others.
    names = sorted(norms, key=lambda name: -np.nan_to_num(norms[name], nan=np.inf))
    largest = [f"{name} {norms[name]:.3g}" for name in names[:_MODULES_SHOWN]]
    if len(names) > _MODULES_SHOWN:
        largest.append(f"{len(names) - _MODULES_SHOWN} others less")
    return (
        f"{quantity} is not finite at step {int(state.step) + 1} "
        f"(loss by quartile of t: {', '.join(f'{mean:.3g}' for mean in means)}; "
        f"norm of the gradient by module: {', '.join(largest)})"
    )
