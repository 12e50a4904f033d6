"""The train state: all that a run has to save, as one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class Window(NamedTuple):
    """Sums since the last line of the log, kept on the device so that the loop never waits.

    Attributes:
      steps: training steps summed.
      loss: of the batch means.
      grad_norm: of the global gradient norms.
      quartile_loss: of per-example losses, by quartile of t, (0, T/4] first.
      quartile_count: examples in each quartile.
      skipped_steps: steps of the run whose loss, gradient or parameters were not finite and which
        were left out; within the limit of `train.skip_nonfinite`.
      first_bad_step: the first such step beyond the limit, else −1; nothing changes from it on.
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
        """A window of no steps."""
        return cls(  # a buffer each: all are donated
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
      step: steps taken.
      params: {"network": …}, and "noise_schedule" beside it where the schedule is learned.
      ema_params: their exponential moving average, which is what is evaluated.
      opt_state: optax's.
      window: running sums for the log.
      history: of losses, where importance sampling follows them; else empty.
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
    """The state before the first step."""
    ema_params = jax.tree.map(jnp.copy, params)  # not the same buffers: both are donated
    opt_state, history = optimizer.init(params), {} if history is None else history
    return TrainState(jnp.int32(0), params, ema_params, opt_state, Window.empty(), history)
