"""Training: from a config to checkpoints in a work directory, resumed by the same call."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.evaluate import make_quick_bound
from experiments.harness import data, devices, pictures, sampling, settings, steps
from experiments.harness import workdir as workdirs
from experiments.harness.checkpoints import Checkpoints, is_new, load_ema
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.loss import init_history
from experiments.harness.metrics import MetricsLog
from experiments.harness.progress import progress
from experiments.harness.sampling import Drawer, to_bytes
from experiments.harness.settings import Problem
from experiments.harness.state import (
    TrainState,
    Window,
    abstract_params,
    init_params,
    init_state,
    learning_rate,
    make_optimizer,
)


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
      RunError: if a loss or gradient is not finite; no state since was saved.
    """
    check(config)
    problem, optimizer = settings.build(config), _optimizer(config)
    workdirs.check(config, workdir)
    initial = initial_params(config, problem, workdir)
    if is_new(workdir):
        workdirs.forget_results(workdir)
    workdirs.record(config, workdir)
    with Checkpoints(workdir, keep_last=config.train.keep_checkpoints) as checkpoints:
        history = init_history(config, problem)
        state = restore_or_start(config, optimizer, checkpoints, initial, history)
        first_step = int(state.step)
        if first_step >= config.train.num_steps:
            return state
        with MetricsLog(workdir, first_step or None) as log:
            trainer = Trainer(config, workdir, problem, optimizer, checkpoints, log)
            return trainer.run(state)


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that `train` can't use; compiles nothing."""
    sampling.check(config, settings.build(config))
    _optimizer(config)
    for section in ("train", "evaluate", "sample"):
        devices.check_batch(f"config.{section}.batch_size", config[section].batch_size)
    settings.check_positive(
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
    for name in (*rates, "warmup_steps", "gradient_clip", "weight_decay"):
        settings.check_setting(config, f"train.{name}", lambda x: x >= 0, "it must not be negative")
    for name in ("ema_decay", "beta2"):
        settings.check_setting(
            config, f"train.{name}", lambda x: 0 <= x < 1, "it must be in [0, 1)"
        )
    is_share, remedy = (lambda x: 0 <= x <= 1), "it must be in [0, 1]"
    settings.check_setting(config, "train.label_dropout", is_share, remedy)
    settings.describe_data(config, "validation")
    num_examples = settings.describe_data(config, "train").num_examples
    if config.train.batch_size > num_examples:
        raise ConfigError(
            f"config.train.batch_size = {config.train.batch_size} is more than the "
            f"{num_examples} training examples of {config.data.name}"
        )


def _optimizer(config: ConfigDict) -> optax.GradientTransformation:
    return make_optimizer(config.train, learns_schedule=config.schedule.name == "learned")


def initial_params(config: ConfigDict, problem: Problem, workdir: epath.PathLike) -> Any:
    """A function that makes the parameters of step 0: random, or another run's EMA weights."""
    if not config.train.init_from or not is_new(workdir):
        return lambda: init_params(problem, config.seed)
    params, _ = load_ema(
        config.train.init_from,
        "best",
        abstract_params(problem),
        setting="config.train.init_from",
    )
    return lambda: params


def restore_or_start(
    config: ConfigDict,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    initial: Callable[[], Any],
    history: Any,
) -> TrainState:
    """The latest checkpoint's state, or the state of step 0, on every device."""
    everywhere = devices.replicated(devices.mesh())
    latest = checkpoints.latest_step()
    if latest is None:
        return devices.place(init_state(initial(), optimizer, history), everywhere)
    like = jax.eval_shape(lambda: init_state(initial(), optimizer, history))
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), like)
    if latest < config.train.num_steps:
        tqdm.write(f"resuming from step {latest} of {config.train.num_steps}")
    return checkpoints.restore(latest, like)


class Clock:
    """Seconds that training steps alone have taken since it was last read."""

    def __init__(self):
        self._seconds, self._steps, self._started = 0.0, 0, time.monotonic()

    def tick(self) -> None:
        """Counts a step."""
        self._steps += 1

    @contextmanager
    def paused(self, state: TrainState) -> Iterator[None]:
        """Waits for the steps under way, then leaves out what happens inside."""
        jax.block_until_ready(state.step)
        self._seconds += time.monotonic() - self._started
        yield
        self._started = time.monotonic()

    def read(self) -> float:
        """Steps per second; starts anew. To be called while paused."""
        rate = self._steps / self._seconds if self._seconds else 0.0
        self._seconds, self._steps = 0.0, 0
        return rate


class Trainer:
    """The loop, with what it does every so many steps.

    Nothing in the loop waits for the device but the lines of the log, the checks on validation and
    the sample grids.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.PathLike,
        problem: Problem,
        optimizer: optax.GradientTransformation,
        checkpoints: Checkpoints,
        log: MetricsLog,
    ):
        self.config, self.workdir, self.problem = config, epath.Path(workdir), problem
        self.checkpoints, self.log = checkpoints, log
        mesh = devices.mesh()
        dataset = settings.load_data(config, "train")
        self.num_examples = len(dataset.images)
        self.examples = devices.place(dataset.examples(slice(None)), devices.replicated(mesh))
        self.train_step = steps.make_train_step(config, problem, optimizer, mesh)
        validation = settings.load_data(config, "validation")
        self.quick_bound = make_quick_bound(config, problem, validation)
        self.preview = Drawer(config, problem)
        self.learning_rate = learning_rate(config.train)

    def run(self, state: TrainState) -> TrainState:
        """Steps to the end."""
        seed, batch_size = self.config.seed, self.config.train.batch_size
        first, last = int(state.step), self.config.train.num_steps
        clock = Clock()
        with progress(last, "train", "step", initial=first) as bar:
            for step in range(first, last):
                indices = data.batch_indices(seed, step, self.num_examples, batch_size)
                state = self.train_step(state, self.examples, indices)
                clock.tick()
                bar.update()
                if step == first:
                    with clock.paused(state):
                        clock.read()  # the first step compiles; it is no measure of speed
                # The log before the checkpoint: what a checkpoint is of has been written down.
                if self.is_due("log_every", step + 1):
                    with clock.paused(state):
                        self.write_log(state, bar, clock.read())
                if self.is_due("sample_every", step + 1):
                    with clock.paused(state):
                        self.write_samples(state)
                if self.is_due("checkpoint_every", step + 1):
                    with clock.paused(state):
                        self.save(state)
        return state

    def is_due(self, setting: str, done: int) -> bool:
        """Whether this is done after so many steps; all of it is after the last."""
        return done % self.config.train[setting] == 0 or done == self.config.train.num_steps

    def write_log(self, state: TrainState, bar: tqdm, steps_per_second: float) -> None:
        """A line of means over the steps since the last one."""
        step, window = int(state.step), jax.device_get(state.window)
        self.stop_if_not_finite(window)
        loss = float(window.loss / window.steps)
        images_per_second = steps_per_second * self.config.train.batch_size
        by_quartile = window.quartile_loss / np.maximum(window.quartile_count, 1)
        self.log.write(
            step,
            loss=loss,
            grad_norm=float(window.grad_norm / window.steps),
            learning_rate=float(self.learning_rate(step - 1)),
            **{f"loss_quartile_{i + 1}": float(mean) for i, mean in enumerate(by_quartile)},
            images_per_second=images_per_second,
        )
        bar.set_postfix_str(f"loss {loss:.4f}, {images_per_second:.0f} images/s")

    def write_samples(self, state: TrainState) -> None:
        """A grid of samples from the EMA weights, always of the same noise."""
        step, n = int(state.step), self.config.sample.batch_size
        schedule = self.problem.learned(state.ema_params).schedule
        levels = schedule.levels(self.config.train.sample_timesteps)
        made = self.preview(state.ema_params, levels, n).x_0
        grid = pictures.grid(to_bytes(self.problem, made))
        pictures.save_png(self.workdir / "samples" / f"step_{step:08d}.png", grid)
        self.log.image("samples", step, grid)

    def save(self, state: TrainState) -> None:
        """A quick bound on validation, and a checkpoint that remembers it."""
        step = int(state.step)
        self.stop_if_not_finite(jax.device_get(state.window))
        validation = self.quick_bound(state.ema_params)
        if not np.isfinite(validation):
            raise RunError(
                f"the bound on validation is {validation} at step {step}; it is not saved"
            )
        self.log.write(step, validation_bits_per_dim=validation)
        tqdm.write(f"step {step}: validation bits/dim {validation:.4f}")
        self.checkpoints.save(step, state, validation)

    def stop_if_not_finite(self, window: Window) -> None:
        """Raises RunError if a step since the start had a loss or gradient that is not finite."""
        if window.first_bad_step < 0:
            return
        by_quartile = window.quartile_loss / np.maximum(window.quartile_count, 1)
        latest = self.checkpoints.latest_step()
        kept = "no checkpoint was saved" if latest is None else f"step {latest} is the last saved"
        raise RunError(
            f"the loss or its gradient was not finite at step {int(window.first_bad_step)} "
            f"(loss by quartile of t since: {', '.join(f'{x:.3g}' for x in by_quartile)}); {kept}; "
            "try a lower config.train.learning_rate or config.train.gradient_clip"
        )
