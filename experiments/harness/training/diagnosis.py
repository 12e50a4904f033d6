"""What a training step that is not finite was like."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from experiments.harness import devices
from experiments.harness.data.splits import Examples
from experiments.harness.training.state import TrainingSetup, TrainState
from experiments.harness.training.step import make_gradients, quartile_of

_MODULES_SHOWN = 8


def describe_bad_step(
    setup: TrainingSetup,
    state: TrainState,
    examples: Examples,
    indices: Int[Array | np.ndarray, "b"] | None,
) -> str:
    """The losses and gradients of a step in a line, computed again from the state before it."""

    def numbers(state, examples, indices):
        batch, grads = make_gradients(setup)(state, examples, indices)
        quartile = quartile_of(batch.time)
        sums = jnp.zeros(4).at[quartile].add(batch.unweighted)
        means = sums / jnp.zeros(4).at[quartile].add(1.0)  # NaN of none
        modules = {
            name if part == "network" else f"{part}/{name}": optax.tree.norm(module)
            for part, tree in grads.items()
            for name, module in tree.items()
        }
        return batch.losses.mean(), means, modules

    compute = jax.jit(numbers, out_shardings=devices.replicated(setup.mesh))
    loss, means, modules = jax.device_get(compute(state, examples, indices))
    what = "the loss"
    if np.isfinite(loss):
        is_finite = all(np.isfinite(norm) for norm in modules.values())
        what = "what the step makes of the parameters" if is_finite else "the gradient"
    # The largest first, and before them those that are not finite.
    names = sorted(modules, key=lambda name: -np.nan_to_num(modules[name], nan=np.inf))
    norms = [f"{name} {modules[name]:.3g}" for name in names[:_MODULES_SHOWN]]
    if len(names) > _MODULES_SHOWN:
        norms.append(f"{len(names) - _MODULES_SHOWN} others less")
    return (
        f"{what} is not finite at step {int(state.step) + 1} "
        f"(loss by quartile of t: {', '.join(f'{mean:.3g}' for mean in means)}; "
        f"norm of the gradient by module: {', '.join(norms)})"
    )
