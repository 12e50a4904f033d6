"""The train state: all that a run has to save, as one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from experiments.harness.errors import ConfigError
from experiments.harness.seeds import stream
from experiments.harness.settings import Problem, pick


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


def init_params(problem: Problem, seed: int) -> Any:
    """The networks' parameters, a function of the seed."""
    key, x_t = stream(seed, "params"), jnp.zeros((1, *problem.image_shape))
    params = {"network": jax.jit(problem.network.init)(key, x_t, jnp.zeros(1))["params"]}
    if problem.noise_schedule is not None:
        schedule_key = jax.random.fold_in(key, 1)
        params["noise_schedule"] = problem.noise_schedule.init(schedule_key, jnp.zeros(1))["params"]
    return params


def abstract_params(problem: Problem) -> Any:
    """Shapes and dtypes of the networks' parameters; nothing is computed."""
    return jax.eval_shape(lambda: init_params(problem, 0))


def init_state(
    params: Any, optimizer: optax.GradientTransformation, history: Any = None
) -> TrainState:
    """The state before the first step."""
    ema_params = jax.tree.map(jnp.copy, params)  # not the same buffers: both are donated
    opt_state, history = optimizer.init(params), {} if history is None else history
    return TrainState(jnp.int32(0), params, ema_params, opt_state, Window.empty(), history)


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up from zero, then constant, or a cosine to zero at the last step."""
    peak, warmup, last = config.learning_rate, config.warmup_steps, config.num_steps
    decays = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(last - warmup, 1)),
    }
    after = pick(decays, config.decay, "config.train.decay")()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(
    config: ConfigDict, learns_schedule: bool = False
) -> optax.GradientTransformation:
    """Adam or AdamW behind a clip of the global gradient norm.

    Args:
      config: the section `train`.
      learns_schedule: whether the parameters have a "noise_schedule", which gets an Adam of its own
        at a constant rate.

    Raises:
      ConfigError: for an unknown optimizer or decay, or a setting that would have no effect.
    """
    rate = learning_rate(config)
    optimizers = {
        "adam": lambda: optax.adam(rate, b2=config.beta2),
        "adamw": lambda: optax.adamw(rate, b2=config.beta2, weight_decay=config.weight_decay),
    }
    optimizer = pick(optimizers, config.optimizer, "config.train.optimizer")()
    if config.weight_decay and config.optimizer != "adamw":
        raise ConfigError(
            f"config.train.weight_decay = {config.weight_decay} has no effect with "
            f"config.train.optimizer = {config.optimizer!r}; use adamw"
        )
    if config.gradient_clip:
        optimizer = optax.chain(optax.clip_by_global_norm(config.gradient_clip), optimizer)
    if not learns_schedule:
        return optimizer
    parts = {"network": optimizer, "noise_schedule": optax.adam(config.schedule_learning_rate)}
    return optax.partition(parts, lambda params: {part: part for part in params})
