"""Training: from a config to checkpoints in a work directory, resumed by the same call."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.harness import checks, devices
from experiments.harness.data import splits
from experiments.harness.data.feed import require_same_data
from experiments.harness.data.stream import is_streamed
from experiments.harness.errors import ConfigError
from experiments.harness.sampling import sampler
from experiments.harness.setup.definition import ModelDefinition, define_model
from experiments.harness.setup.params import init_params
from experiments.harness.setup.trained import load_ema
from experiments.harness.training import speed
from experiments.harness.training import step as steps
from experiments.harness.training.loop import Trainer
from experiments.harness.training.loss import init_history, make_objective
from experiments.harness.training.optimizer import make_optimizer
from experiments.harness.training.state import TrainState, init_state
from experiments.harness.training.step import abstract_state, state_shardings
from experiments.harness.workdir import lock, record
from experiments.harness.workdir.checkpoints import Checkpoints, is_new
from experiments.harness.workdir.metrics import MetricsLog


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains, or resumes."""
    state = train(config, workdir)
    print(f"{workdir}: trained to step {int(state.step)}")


def train(config: ConfigDict, workdir: epath.PathLike) -> TrainState:
    """Trains to `train.num_steps`, from the last checkpoint where there is one.

    A resumed run equals an uninterrupted one bit for bit on the same machine: data order and noise
    are functions of the step, and everything else is in the checkpoint.

    Args:
      config: what to train and how.
      workdir: where config.json, metrics.jsonl, TensorBoard events, checkpoints/ and samples/ go.

    Returns:
      The final state.

    Raises:
      ConfigError: for a setting, data set or work directory that does not fit; nothing was written.
      RunError: if a loss, gradient or parameter is not finite, or a checkpoint can't be written; no
        state since was saved.
      Interrupted: where signals are listened to, by a first one; the state is saved.
    """
    check(config)
    definition, optimizer = define_model(config), _optimizer(config)
    source = splits.describe_data(config, "train")
    record.check(config, workdir)
    data = record.DataSummary(source.num_examples, source.image_shape)
    record.check_data(config, workdir, data)
    require_same_data(source)
    load, starts = initial_params(config, definition, optimizer, workdir), is_new(workdir)
    record.make(workdir)
    with (
        lock.held(workdir),
        Checkpoints(workdir, keep_last=config.train.keep_checkpoints) as checkpoints,
    ):
        if starts:
            record.forget_results(workdir)
        state = restore_or_start(config, definition, optimizer, checkpoints, load)
        step = int(state.step)
        record.record(config, workdir, None if starts else step)
        record.record_data(workdir, data)
        is_open = step > 0 and checkpoints.was_interrupted(step)
        if step >= config.train.num_steps and not is_open:
            return state
        # What is due after the step that a signal came in is done once more, and logged anew.
        with MetricsLog(workdir, step - is_open if step else None) as log:
            trainer = Trainer(config, workdir, definition, optimizer, checkpoints, log)
            return trainer.run(state, is_open)


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that `train` can't use; compiles nothing."""
    definition = define_model(config)
    sampler.check(config, definition)
    make_objective(config)
    _optimizer(config)
    steps.check(config, definition)
    speed.check(config)
    for section in ("evaluate", "sample"):
        devices.check_batch(f"config.{section}.batch_size", config[section].batch_size)
    checks.check_positive(
        config,
        "train.num_steps",
        "train.log_every",
        "train.checkpoint_every",
        "train.sample_every",
        "train.sample_timesteps",
        "train.keep_checkpoints",
        "train.validation_timesteps",
    )
    rates = ("learning_rate", "schedule_learning_rate")
    for name in (*rates, "warmup_steps", "gradient_clip", "weight_decay", "skip_nonfinite"):
        checks.check_setting(config, f"train.{name}", lambda x: x >= 0, "it must not be negative")
    for name in ("ema_decay", "beta2"):
        checks.check_setting(config, f"train.{name}", lambda x: 0 <= x < 1, "it must be in [0, 1)")
    is_share, remedy = (lambda x: 0 <= x <= 1), "it must be in [0, 1]"
    checks.check_setting(config, "train.label_dropout", is_share, remedy)
    record.check_names(config, "train.allow_changes")
    splits.check_split(config, "validation")
    source = splits.describe_data(config, "train")
    is_streamed(config.data, source)  # raises, for settings of no meaning
    num_examples = source.num_examples
    if config.train.batch_size > num_examples:
        raise ConfigError(
            f"config.train.batch_size = {config.train.batch_size} is more than the "
            f"{num_examples} training examples of {config.data.name}"
        )


def _optimizer(config: ConfigDict) -> optax.GradientTransformation:
    return make_optimizer(config.train, learns_schedule=config.schedule.name == "learned")


def initial_params(
    config: ConfigDict,
    definition: ModelDefinition,
    optimizer: optax.GradientTransformation,
    workdir: epath.PathLike,
) -> Callable[[], Any] | None:
    """Loads another run's EMA weights as the parameters of step 0; None where they are random."""
    source = config.train.init_from
    if not source:
        return None
    like = abstract_state(config, definition, optimizer, devices.mesh(config)).params

    def load():
        return load_ema(source, "best", like, setting="config.train.init_from")[0]

    if not is_new(workdir):
        return load  # for nothing, unless all checkpoints turn out to be damaged
    params = load()
    return lambda: params


def restore_or_start(
    config: ConfigDict,
    definition: ModelDefinition,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    load: Callable[[], Any] | None,
) -> TrainState:
    """The state of the latest checkpoint that is good, or of step 0, laid out on the devices."""
    mesh = devices.mesh(config)
    if checkpoints.latest_step() is not None:
        like = abstract_state(config, definition, optimizer, mesh)
        state = checkpoints.first_good("latest", lambda step: checkpoints.restore(step, like))
        if state is not None:
            step, several = int(state.step), config.train.steps_per_dispatch
            if step % several:
                raise ConfigError(
                    f"config.train.steps_per_dispatch = {several}, but the run goes on from step "
                    f"{step}; use a divisor of it"
                )
            if step < config.train.num_steps:
                tqdm.write(f"resuming from step {step} of {config.train.num_steps}")
            return state
        tqdm.write("no checkpoint is left: starting anew")
    return first_state(config, definition, optimizer, load)


def first_state(
    config: ConfigDict,
    definition: ModelDefinition,
    optimizer: optax.GradientTransformation,
    load: Callable[[], Any] | None = None,
) -> TrainState:
    """The state of step 0. Each device makes its own part of it, and never has all.

    Args:
      config: the config.
      definition: the mathematics it names.
      optimizer: whose state it has.
      load: makes the parameters, on the devices; None for random ones.
    """
    shardings = state_shardings(definition, optimizer, devices.mesh(config))

    def start(params):
        return init_state(params, optimizer, init_history(config, definition))

    if load is None:
        return jax.jit(
            lambda: start(init_params(definition, config.seed)), out_shardings=shardings
        )()
    return jax.jit(start, out_shardings=shardings)(load())
