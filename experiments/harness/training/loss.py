"""The training loss of a batch, from parameters, data and a key."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from diffusion.learned_schedule import variance_surrogate
from diffusion.objectives import OBJECTIVES, Objective
from diffusion.schedules import Levels
from diffusion.timesteps import TIMES, LossHistory, by_importance, to_timestep
from experiments.harness.setup.definition import ModelDefinition


class Inputs(NamedTuple):
    """A batch with its random draws: x_t is a function of the three arrays.

    Attributes:
      x_0: the examples, in data units.
      eps: their noise.
      time: their times in [0, 1), as a draw from `diffusion.timesteps.TIMES` gives them.
      labels: the network's condition; None if it has none.
    """

    x_0: Float[Array, "b ..."]
    eps: Float[Array, "b ..."]
    time: Float[Array, "b"]
    labels: Int[Array, "b"] | None


class Batch(NamedTuple):
    """The losses of a batch by example.

    Attributes:
      losses: the losses; their mean is the batch's loss.
      unweighted: the losses without the weights of importance sampling.
      time: time in (0, 1].
      t: timestep; zero in continuous time.
    """

    losses: Float[Array, "b"]
    unweighted: Float[Array, "b"]
    time: Float[Array, "b"]
    t: Int[Array, "b"]


DrawFn = Callable[..., tuple[Inputs, Array]]
"""(key, x_0, labels=None) -> (Inputs, key for dropout)."""

LossFn = Callable[..., tuple[Array, Batch]]
"""(params, inputs, dropout_key, history) -> (scalar to be differentiated, Batch)."""


def make_draw(config: ConfigDict) -> DrawFn:
    """The random draws of a batch. Times are stratified over the whole batch by default."""
    name = config.train.timesteps
    draw_time = TIMES["stratified" if name == "importance" else name]

    def draw(key, x_0, labels=None):
        eps_key, time_key, dropout_key = jax.random.split(key, 3)
        eps, time = jax.random.normal(eps_key, x_0.shape), draw_time(time_key, len(x_0))
        return Inputs(x_0, eps, time, labels), dropout_key

    return draw


def make_loss(config: ConfigDict, definition: ModelDefinition) -> LossFn:
    """The config's objective, as a function of parameters and a batch with its draws."""
    objective = make_objective(config)
    follows_losses = config.train.timesteps == "importance"
    num_timesteps = definition.levels.num_timesteps

    def discrete(params, inputs, dropout_key, history):
        x_0, eps, time, labels = inputs
        model = definition.model(params, labels, dropout_key)
        if follows_losses:
            t, weight = by_importance(time, history.probabilities())
        else:
            t, weight = to_timestep(time, num_timesteps), 1.0
        loss = objective.discrete(model, x_0, eps, t)
        losses = loss.rest + weight * loss.term
        return losses.mean(), Batch(losses, loss.rest + loss.term, t / num_timesteps, t)

    def continuous(params, inputs, dropout_key, history):
        del history
        x_0, eps, time, labels = inputs
        model = definition.model(params, labels, dropout_key)
        time = 1 - time  # in (0, 1], as t/T
        if definition.noise_schedule is None:
            log_snr, slope = definition.schedule.log_snr(time), definition.schedule.slope(time)
        else:
            log_snr, slope, levels = _learned_levels(definition, params, time)
            model = model._replace(levels=levels)
        loss = objective.continuous(model, x_0, eps, log_snr, slope)
        losses = loss.rest + loss.term
        total = losses.mean()
        if definition.noise_schedule is not None:
            total += _schedule_variance(definition, params, time, loss.term / -slope)
        return total, Batch(losses, losses, time, jnp.zeros(len(time), jnp.int32))

    return continuous if config.train.time == "continuous" else discrete


def init_history(config: ConfigDict, definition: ModelDefinition) -> LossHistory | dict:
    """The loss history of importance sampling before the first step; without it an empty dict."""
    if config.train.timesteps == "importance":
        return LossHistory.empty(definition.levels.num_timesteps)
    return {}


def _learned_levels(
    definition: ModelDefinition, params: Any, time: Float[Array, "b"]
) -> tuple[Float[Array, "b"], Float[Array, "b"], Levels]:
    """λ and dλ/dt at these times, and the first and last level, which prior and reconstruction use.

    The bound has gradients with respect to the schedule's two ends only.
    """
    schedule, variables = definition.noise_schedule, {"params": params["noise_schedule"]}
    log_snr, slope = schedule.apply(variables, time, method="ends_only")
    first, last = schedule.apply(variables, method="ends")
    infinite = jnp.full_like(first, jnp.inf)
    ends = Levels(jnp.stack([infinite, first, last]), jnp.stack([infinite, infinite, first - last]))
    return log_snr, slope, ends


def _schedule_variance(
    definition: ModelDefinition, params: Any, time: Float[Array, "b"], half_error: Float[Array, "b"]
) -> Float[Array, ""]:
    """The relative variance of the loss as a function of the schedule's interior.

    Its mean is subtracted without a gradient: its value is zero, and only its gradient counts.
    """

    def log_snr(time):
        variables = {"params": params["noise_schedule"]}
        return definition.noise_schedule.apply(variables, time, method="interior_only")

    relative = variance_surrogate(log_snr, time, jax.lax.stop_gradient(half_error)).mean()
    return relative - jax.lax.stop_gradient(relative)


def make_objective(config: ConfigDict) -> Objective:
    """The training loss that the config names."""
    name = config.train.objective
    return OBJECTIVES[name](**config.train.get(name, {}))
