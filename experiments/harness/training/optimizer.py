"""The optimizer and its learning rate, as the config names them."""

import optax
from ml_collections import ConfigDict

from experiments.harness.checks import pick
from experiments.harness.errors import ConfigError


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
