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


class Batch(NamedTuple):
    """What a loss says of its examples, beside its mean.

    Attributes:
      losses: of each example; their mean is the batch's loss.
      unweighted: the same without the weight of an importance-sampled t.
      time: where in (0, 1] each was drawn.
      t: the timestep; zero in continuous time.
    """

    losses: Float[Array, "b"]
    unweighted: Float[Array, "b"]
    time: Float[Array, "b"]
    t: Int[Array, "b"]


LossFn = Callable[..., tuple[Array, Batch]]
"""(params, x_0, key, history, labels=None, part=…) -> (what is differentiated, Batch).

`part` picks the examples to take the loss of out of whatever has all of a batch's: random numbers
are drawn for the whole batch first, so that no example's depend on the part that it is in.
"""


def whole(tree: Any) -> Any:
    """The part that is all of a batch."""
    return tree


def make_loss(config: ConfigDict, definition: ModelDefinition) -> LossFn:
    """The config's objective over its draws of time."""
    objective = make_objective(config)
    by_history = config.train.timesteps == "importance"
    draw_time = TIMES["stratified" if by_history else config.train.timesteps]
    num_timesteps = definition.levels.num_timesteps

    def discrete(params, x_0, key, history, labels=None, part=whole):
        x_0, eps, time, model = draw(params, x_0, key, labels, part)
        if by_history:
            t, weight = by_importance(time, history.probabilities())
        else:
            t, weight = to_timestep(time, num_timesteps), 1.0
        loss = objective.discrete(model, x_0, eps, t)
        losses = loss.rest + weight * loss.term
        return losses.mean(), Batch(losses, loss.rest + loss.term, t / num_timesteps, t)

    def continuous(params, x_0, key, history, labels=None, part=whole):
        del history
        x_0, eps, time, model = draw(params, x_0, key, labels, part)
        time = 1 - time  # in (0, 1], as t/T is
        if definition.noise_schedule is None:
            log_snr, slope = definition.schedule.log_snr(time), definition.schedule.slope(time)
        else:
            log_snr, slope, levels = _learned_levels(definition, params, time)
            model = model._replace(levels=levels)
        loss = objective.continuous(model, x_0, eps, log_snr, slope)
        losses = loss.rest + loss.term
        total = losses.mean()
        if definition.noise_schedule is not None:
            total += _of_schedule(definition, params, time, loss.term / -slope)
        return total, Batch(losses, losses, time, jnp.zeros(len(time), jnp.int32))

    def draw(params, x_0, key, labels, part):
        eps_key, time_key, dropout_key = jax.random.split(key, 3)
        eps, time = jax.random.normal(eps_key, x_0.shape), draw_time(time_key, len(x_0))
        x_0, eps, time, labels = part((x_0, eps, time, labels))
        return x_0, eps, time, definition.model(params, labels, dropout_key)

    return continuous if config.train.time == "continuous" else discrete


def init_history(config: ConfigDict, definition: ModelDefinition) -> LossHistory | dict:
    """The losses that importance sampling follows; nothing where there is none."""
    if config.train.timesteps == "importance":
        return LossHistory.empty(definition.levels.num_timesteps)
    return {}


def _learned_levels(
    definition: ModelDefinition, params: Any, time: Float[Array, "b"]
) -> tuple[Float[Array, "b"], Float[Array, "b"], Levels]:
    """λ and dλ/dt for the bound, which trains the two ends at most; and these as levels."""
    schedule, variables = definition.noise_schedule, {"params": params["noise_schedule"]}
    log_snr, slope = schedule.apply(variables, time, method="ends_only")
    first, last = schedule.apply(variables, method="ends")
    infinite = jnp.full_like(first, jnp.inf)
    ends = Levels(jnp.stack([infinite, first, last]), jnp.stack([infinite, infinite, first - last]))
    return log_snr, slope, ends


def _of_schedule(
    definition: ModelDefinition, params: Any, time: Float[Array, "b"], half_error: Float[Array, "b"]
) -> Float[Array, ""]:
    """The relative variance of the loss as a function of the schedule's interior; of value zero."""

    def log_snr(time):
        variables = {"params": params["noise_schedule"]}
        return definition.noise_schedule.apply(variables, time, method="interior_only")

    relative = variance_surrogate(log_snr, time, jax.lax.stop_gradient(half_error)).mean()
    return relative - jax.lax.stop_gradient(relative)


def make_objective(config: ConfigDict) -> Objective:
    """The training loss that the config names."""
    name = config.train.objective
    return OBJECTIVES[name](**config.train.get(name, {}))
