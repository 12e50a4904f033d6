"""Training: from a config to checkpoints in a work directory, resumed by the same call."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.harness import checks, devices, memory, paths
from experiments.harness.data import splits
from experiments.harness.data.feed import require_same_data
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.evaluation.quick_bound import make_quick_bound
from experiments.harness.processes import signals
from experiments.harness.sampling import sampler
from experiments.harness.sampling.draw import Drawer, save_grid
from experiments.harness.setup.definition import ModelDefinition, define_model
from experiments.harness.setup.trained import load_ema
from experiments.harness.training import step as steps
from experiments.harness.training.log_line import LogLine
from experiments.harness.training.loop import Task, Trainer
from experiments.harness.training.speed import Timing
from experiments.harness.training.state import (
    TrainingSetup,
    TrainState,
    abstract_state,
    first_state,
    make_setup,
)
from experiments.harness.workdir import lock, record, sessions
from experiments.harness.workdir.checkpoints import Checkpoints, is_new
from experiments.harness.workdir.metrics import MetricsLog


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains or resumes, and prints the step."""
    state = train(config, workdir)
    print(f"{workdir}: trained to step {int(state.step)}")


def train(config: ConfigDict, workdir: epath.PathLike, checked: bool = False) -> TrainState:
    """Trains to `train.num_steps`, from the last checkpoint where there is one.

    A resumed run equals an uninterrupted one bit for bit on the same machine: data order and noise
    are functions of the step, and everything else is in the checkpoint.

    Args:
      config: the config.
      workdir: the work directory. It gets config.json, metrics.jsonl, TensorBoard events,
        checkpoints/ and samples/.
      checked: whether the config has passed `check`.

    Returns:
      The final state.

    Raises:
      ConfigError: for an invalid setting, data set or work directory; nothing was written.
      RunError: if a loss, gradient or parameter is not finite, or a checkpoint cannot be written;
        the last saved state is an earlier one.
      Interrupted: after a signal, within `signals.listening`; the state is saved.
    """
    if not checked:
        check(config)
    setup = make_setup(config)
    source = splits.describe_data(config, "train")
    record.check(config, workdir)
    record.check_trainable(workdir)
    data = record.DataSummary(*source.summary())
    record.check_data(config, workdir, data)
    require_same_data(source)
    load, starts = initial_params(setup, workdir), is_new(workdir)
    record.make(workdir)
    with (
        lock.held(workdir),
        Checkpoints(workdir, keep_last=config.train.keep_checkpoints) as checkpoints,
    ):
        if starts:
            record.forget_results(workdir)
        state = restore_or_start(setup, checkpoints, load)
        step = int(state.step)
        record.record(config, workdir, None if starts else step)
        record.record_data(workdir, data)
        tasks_pending = step > 0 and checkpoints.was_interrupted(step)
        if step >= config.train.num_steps and not tasks_pending:
            return state
        # The pending tasks of a step write its log lines again.
        with (
            MetricsLog(workdir, step - tasks_pending if step else None) as log,
            sessions.recorded(workdir, step, state.params),
        ):
            log.events.settings(config)
            tasks = scheduled_tasks(setup, workdir, checkpoints, log)
            return Trainer(setup, workdir, checkpoints, tasks).run(state, tasks_pending)


def scheduled_tasks(
    setup: TrainingSetup, workdir: epath.PathLike, checkpoints: Checkpoints, log: MetricsLog
) -> list[Task]:
    """What training does every so many steps besides taking them.

    At a step that has several tasks they run in this order. The log line comes before the
    checkpoint, so that a resumed run finds the lines of all steps before its checkpoint.
    """
    train = setup.config.train
    save = validate_and_save(setup, checkpoints, log)
    return [
        Task("log line", train.log_every, LogLine(setup.config, log)),
        Task("sample grid", train.sample_every, draw_samples(setup, workdir, log)),
        Task("validation bound and checkpoint", train.checkpoint_every, save),
    ]


def draw_samples(
    setup: TrainingSetup, workdir: epath.PathLike, log: MetricsLog
) -> Callable[[TrainState, Timing], None]:
    """The task that writes samples/step_….png from the EMA weights, always with the same noise."""
    config, definition = setup.config, setup.definition
    drawer = Drawer(config, definition)

    def run(state: TrainState, timing: Timing) -> None:
        del timing
        step, params = int(state.step), ema_everywhere(setup, state)
        levels = definition.learned(params).schedule.levels(config.train.sample_timesteps)
        try:
            with interruptible():
                samples = drawer(params, levels, config.sample.batch_size)
        except RunError as error:  # a young network's samples may diverge: training goes on
            tqdm.write(f"step {step}: no picture of samples ({error})")
            return
        path = epath.Path(workdir) / "samples" / f"step_{step:08d}.png"
        save_grid(path, definition, samples.x_0)
        log.events.pictures(step, {"samples": path})

    return run


def validate_and_save(
    setup: TrainingSetup, checkpoints: Checkpoints, log: MetricsLog
) -> Callable[[TrainState, Timing], None]:
    """The task that estimates the bound on validation data and saves a checkpoint with it."""
    validation = splits.load_data(setup.config, "validation")
    quick_bound = make_quick_bound(setup.config, setup.definition, validation)

    def run(state: TrainState, timing: Timing) -> None:
        del timing
        step = int(state.step)
        with interruptible():
            bits_per_dim = quick_bound(ema_everywhere(setup, state))
        if not np.isfinite(bits_per_dim):
            raise RunError(
                f"the bound on validation is {bits_per_dim} at step {step}; it is not saved"
            )
        log.write(step, validation_bits_per_dim=bits_per_dim)
        tqdm.write(f"step {step}: validation bits/dim {bits_per_dim:.4f}")
        checkpoints.save(step, state, bits_per_dim)

    return run


def ema_everywhere(setup: TrainingSetup, state: TrainState) -> Any:
    """The EMA weights, whole on every device."""
    return devices.place(state.ema_params, devices.replicated(setup.mesh))


def interruptible() -> AbstractContextManager[None]:
    """In the body a signal interrupts at once, if the run is a single process.

    Several processes must all take part in a computation, or those that do would wait forever.
    """
    return signals.raising() if jax.process_count() == 1 else nullcontext()


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that `train` can't use; compiles nothing."""
    checks.check(config, "train")
    check_fit(config, define_model(config))


def check_fit(config: ConfigDict, definition: ModelDefinition) -> None:
    """Raises ConfigError unless checked settings fit the data and the devices."""
    memory.check_memory(config, definition.image_shape, "train")
    sampler.check(config, definition)
    steps.check(config, definition)
    for section in ("evaluate", "sample"):
        devices.check_batch(f"config.{section}.batch_size", config[section].batch_size)
    splits.check_split(config, "validation")
    num_examples = splits.describe_data(config, "train").num_examples
    if config.train.batch_size > num_examples:
        raise ConfigError(
            f"config.train.batch_size = {config.train.batch_size} is more than the "
            f"{num_examples} training examples of {config.data.name}"
        )


def initial_params(setup: TrainingSetup, workdir: epath.PathLike) -> Callable[[], Any] | None:
    """A function that loads another run's EMA weights for step 0; None for random weights."""
    if not setup.config.train.init_from:
        return None
    source = paths.expanded(setup.config.train.init_from, "config.train.init_from")
    like = abstract_state(setup).params

    def load():
        return load_ema(source, "best", like, setting="config.train.init_from")[0]

    if not is_new(workdir):
        return load  # used only if all checkpoints are damaged
    params = load()
    return lambda: params


def restore_or_start(
    setup: TrainingSetup, checkpoints: Checkpoints, load_params: Callable[[], Any] | None
) -> TrainState:
    """The state of the latest undamaged checkpoint, else of step 0; laid out on the devices."""
    train = setup.config.train
    if checkpoints.latest_step() is not None:
        like = abstract_state(setup)
        state = checkpoints.first_good("latest", lambda step: checkpoints.restore(step, like))
        if state is not None:
            step = int(state.step)
            if step % train.steps_per_dispatch:
                raise ConfigError(
                    f"config.train.steps_per_dispatch = {train.steps_per_dispatch}, but the run "
                    f"goes on from step {step}; use a divisor of it"
                )
            if step < train.num_steps:
                tqdm.write(f"resuming from step {step} of {train.num_steps}")
            return state
        tqdm.write("no checkpoint is left: starting anew")
    return first_state(setup, load_params)
