"""The training loop: compiled steps, with tasks that run at scheduled steps between them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from etils import epath

from experiments.harness import devices
from experiments.harness.data.feed import Feed
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.processes import signals
from experiments.harness.processes.progress import progress, start_after
from experiments.harness.processes.signals import Interrupted
from experiments.harness.training import diagnosis
from experiments.harness.training.speed import Profile, Timing
from experiments.harness.training.state import TrainingSetup, TrainState
from experiments.harness.training.step import make_train_step
from experiments.harness.workdir.checkpoints import Checkpoints


class Task(NamedTuple):
    """Work that the loop does at scheduled steps. The clock of the training steps is paused.

    Attributes:
      name: what it does, for a reader of the list of tasks.
      every: number of steps from one run to the next. Every task also runs after the last step.
      run: takes the state and the timing so far; returns a short text for the progress bar, or
        None to leave the bar as it is.
    """

    name: str
    every: int
    run: Callable[[TrainState, Timing], str | None]


class Trainer:
    """Takes training steps, and runs tasks at scheduled steps.

    The host waits for the device only before a task, never between steps.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        workdir: epath.PathLike,
        checkpoints: Checkpoints,
        tasks: Sequence[Task],
    ):
        """Loads the training data.

        Args:
          setup: what the step is compiled from.
          workdir: the work directory.
          checkpoints: its checkpoints, where an interrupted run saves its state.
          tasks: run in this order at a step that has several.
        """
        self.setup, self.workdir = setup, epath.Path(workdir)
        self.checkpoints, self.tasks = checkpoints, tasks
        self.num_steps = setup.config.train.num_steps
        self.steps_per_call = setup.config.train.steps_per_dispatch
        self.feed, self.clock = Feed(setup.config, setup.mesh), Clock()
        self.profile = Profile(setup.config, workdir)
        self.train_step = make_train_step(setup, self.feed.streamed)
        self.packing = self.train_step.packing
        self.largest_signal = devices.LargestOfProcesses(setup.mesh)

    def run(self, state: TrainState, tasks_pending: bool = False) -> TrainState:
        """Trains from the state's step to the last one.

        Args:
          state: the state to start from; it must not be used afterwards.
          tasks_pending: whether the tasks of the state's own step have yet to run, because a signal
            interrupted the run before them.

        Returns:
          The final state.

        Raises:
          RunError: if a step is not finite, or a batch cannot be read.
          Interrupted: after a signal; the state is saved first.
        """
        first, last, state = int(state.step), self.num_steps, self.packing.pack(state)
        with (
            progress(last, "train", "step", initial=first) as self.bar,
            self.profile,
            self.feed.start(first),
        ):
            if tasks_pending:
                self.run_tasks(state, first)
            if first < last:
                state = self.compile_and_take_first_step(state)
            with signals.deferred():
                try:
                    for step in range(first + self.steps_per_call, last, self.steps_per_call):
                        self.run_tasks(state, step)
                        self.profile.before(step - first, state)
                        state = self.train_step(state, *self.next_batch(state))
                        self.clock.count(self.steps_per_call)
                        self.bar.update(self.steps_per_call)
                    if first < last:
                        self.run_tasks(state, last)
                except Interrupted as interrupted:
                    raise self.save_interrupted(state, interrupted.number) from None
                self.checkpoints.wait()
        self.check_for_signals(wait=True)
        return self.packing.unpack(state)

    def compile_and_take_first_step(self, state: TrainState) -> TrainState:
        """The first step is left out of the timing, since the first call of a program is slow."""
        self.bar.set_postfix_str("compiling")
        batch, began = self.feed.next(), time.monotonic()
        flops = self.train_step.compile(state, *batch)
        self.clock.compile_seconds = time.monotonic() - began
        self.clock.flops = flops / self.steps_per_call
        self.profile.before(0, state)
        state = self.train_step(state, *batch)
        jax.block_until_ready(state.step)
        self.bar.set_postfix_str("", refresh=False)
        start_after(self.bar, self.steps_per_call)
        self.feed.read_waited()
        self.clock.start()
        return state

    def run_tasks(self, state: TrainState, step: int) -> None:
        """Runs the tasks that are scheduled after this step.

        Raises:
          Interrupted: if a signal came before the tasks, or in one that can be interrupted.
        """
        self.check_for_signals()
        due = [task for task in self.tasks if step % task.every == 0 or step == self.num_steps]
        if not due:
            return
        with self.clock.paused(state):
            self.check_finite(state)
            self.clock.waited += self.feed.read_waited()
            unpacked = self.packing.unpack(state)
            for task in due:
                self.checkpoints.check()
                text = task.run(unpacked, self.clock.timing())
                if text is not None:
                    self.bar.set_postfix_str(text)

    def next_batch(self, state: TrainState) -> Any:
        """The next step's batch. If it can't be read, saves the state and raises RunError."""
        try:
            return self.feed.next()
        except (ConfigError, RunError) as error:
            if jax.process_count() > 1:  # saving needs all processes, and the others go on
                raise
            self.check_finite(state)
            step = int(state.step)
            self.checkpoints.save_interrupted(step, self.packing.unpack(state))
            raise RunError(
                f"{error}; step {step} is saved in {self.workdir}, and the same command goes on "
                "from there (without the same images the batches would be others: that needs "
                "config.train.allow_changes=('data.',))"
            ) from error

    def check_for_signals(self, wait: bool = False) -> None:
        """Raises Interrupted if any process got a signal; all processes raise at the same step.

        Args:
          wait: whether to wait for the other processes' answers; else they are some steps old.
        """
        number = self.largest_signal(signals.noted(), wait)
        if number:
            raise Interrupted(number, by_all=True)

    def save_interrupted(self, state: TrainState, number: int) -> Interrupted:
        """Saves the state; returns an exception that says how to resume."""
        self.check_finite(state)
        step = int(state.step)
        self.checkpoints.save_interrupted(step, self.packing.unpack(state))
        message = f"step {step} is saved in {self.workdir}; the same command goes on from there"
        return Interrupted(number, message, by_all=True)

    def check_finite(self, state: TrainState) -> None:
        """Raises RunError if a step was not finite and could not be skipped.

        The state stands still from that step on, so the bad step is the next one of the state.
        """
        bad_step = int(state.window.first_bad_step)
        if bad_step < 0:
            return
        batch = self.feed.of_step(bad_step - 1)
        description = diagnosis.describe_bad_step(self.setup, self.packing.unpack(state), *batch)
        latest = self.checkpoints.latest_step()
        saved = "no checkpoint was saved" if latest is None else f"step {latest} is the last saved"
        num_skipped = int(state.window.skipped_steps)
        skipped = f" ({num_skipped} such steps were skipped before)" if num_skipped else ""
        raise RunError(
            f"{description}; {saved}{skipped}; "
            "try a lower config.train.learning_rate or config.train.gradient_clip"
        )


class Clock:
    """Measures training steps alone: it is paused while tasks run.

    Attributes:
      waited: seconds of the measured time in which the loop waited for data.
      compile_seconds: seconds that compilation took; None before it.
      flops: floating-point operations of a step; None if unknown.
    """

    def __init__(self):
        self.waited = 0.0
        self.compile_seconds: float | None = None
        self.flops: float | None = None
        self._steps, self._seconds, self._started = 0, 0.0, time.monotonic()

    def start(self) -> None:
        """Starts the clock; the time until now does not count."""
        self._started = time.monotonic()

    def count(self, steps: int) -> None:
        """Adds steps."""
        self._steps += steps

    @contextmanager
    def paused(self, state: TrainState) -> Iterator[None]:
        """Waits for the dispatched steps; then the clock stands still in the body."""
        jax.block_until_ready(state.step)
        self._seconds += time.monotonic() - self._started
        yield
        self._started = time.monotonic()

    def timing(self) -> Timing:
        """The totals so far; to be called while the clock is paused."""
        return Timing(self._steps, self._seconds, self.waited, self.compile_seconds, self.flops)
