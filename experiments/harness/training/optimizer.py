"""The optimizer and its learning rate, as the config names them."""

import optax
from ml_collections import ConfigDict


def learning_rate(train: ConfigDict) -> optax.Schedule:
    """Linear warm-up from zero, then constant, or a cosine to zero at the last step.

    Args:
      train: the section `train` of the config.
    """
    peak, warmup, last = train.learning_rate, train.warmup_steps, train.num_steps
    decays = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(last - warmup, 1)),
    }
    after = decays[train.decay]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Adam or AdamW after a clip of the global gradient norm.

    The parameters of a learned schedule have their own Adam at a constant rate.
    """
    train = config.train
    rate = learning_rate(train)
    optimizers = {
        "adam": lambda: optax.adam(rate, b2=train.beta2),
        "adamw": lambda: optax.adamw(rate, b2=train.beta2, weight_decay=train.weight_decay),
    }
    optimizer = optimizers[train.optimizer]()
    if train.gradient_clip:
        optimizer = optax.chain(optax.clip_by_global_norm(train.gradient_clip), optimizer)
    if config.schedule.name != "learned":
        return optimizer
    parts = {"network": optimizer, "noise_schedule": optax.adam(train.schedule_learning_rate)}
    return optax.partition(parts, lambda params: {part: part for part in params})
