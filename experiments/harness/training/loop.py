"""The training loop: one compiled step after another, and what is due every so many of them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.harness import devices
from experiments.harness.data import splits
from experiments.harness.data.feed import Feed
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.evaluation.quick_bound import make_quick_bound
from experiments.harness.pictures import images
from experiments.harness.processes import signals
from experiments.harness.processes.progress import progress
from experiments.harness.processes.signals import Interrupted
from experiments.harness.sampling.draw import Drawer, to_bytes
from experiments.harness.setup.definition import ModelDefinition
from experiments.harness.training import diagnosis
from experiments.harness.training.optimizer import learning_rate
from experiments.harness.training.speed import Compiled, Profile, Speed, flops
from experiments.harness.training.state import TrainState
from experiments.harness.training.step import make_train_step
from experiments.harness.workdir.checkpoints import Checkpoints
from experiments.harness.workdir.metrics import MetricsLog


class Clock:
    """Seconds that training steps alone have taken since it was last read."""

    def __init__(self):
        self._seconds, self._steps, self._started = 0.0, 0, time.monotonic()

    def tick(self, steps: int) -> None:
        """Counts steps."""
        self._steps += steps

    @contextmanager
    def paused(self, state: TrainState) -> Iterator[None]:
        """Waits for the steps under way, then leaves out what happens inside."""
        jax.block_until_ready(state.step)
        self._seconds += time.monotonic() - self._started
        yield
        self._started = time.monotonic()

    def read(self) -> tuple[int, float]:
        """Steps, and seconds that they took; starts anew. To be called while paused."""
        read = self._steps, self._seconds
        self._seconds, self._steps = 0.0, 0
        return read


class Trainer:
    """The loop, with what it does every so many steps.

    Nothing in the loop waits for the device but the lines of the log, the checks on validation and
    the sample grids.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.PathLike,
        definition: ModelDefinition,
        optimizer: optax.GradientTransformation,
        checkpoints: Checkpoints,
        log: MetricsLog,
    ):
        self.config, self.workdir, self.definition = config, epath.Path(workdir), definition
        self.optimizer, self.checkpoints, self.log = optimizer, checkpoints, log
        self.mesh, self.several = devices.mesh(config), config.train.steps_per_dispatch
        self.feed = Feed(config, self.mesh)
        validation = splits.load_data(config, "validation")
        self.quick_bound = make_quick_bound(config, definition, validation)
        self.preview = Drawer(config, definition)
        self.learning_rate = learning_rate(config.train)
        self.profile, self.clock = Profile(config, workdir), Clock()
        self.speed, self.compiling = Speed(config.train.batch_size), {}
        self.asked_to_stop = devices.Agreed(self.mesh)

    def run(self, state: TrainState, is_open: bool = False) -> TrainState:
        """Steps to the end, first doing what is due after the state's own step if it is open.

        A signal is only noted while there are steps to lose, and looked for between them.
        """
        first, last = int(state.step), self.config.train.num_steps
        with (
            progress(last, "train", "step", initial=first) as bar,
            self.profile,
            self.feed.start(first),
        ):
            if is_open:
                self.do_what_is_due(state, first, bar)
            if first < last:
                state = self.first_step(state, bar)
            with signals.deferred():
                try:
                    for step in range(first + self.several, last, self.several):
                        self.do_what_is_due(state, step, bar)
                        self.profile.before(step - first, state)
                        state = self.train_step(state, *self.next_batch(state))
                        self.clock.tick(self.several)
                        bar.update(self.several)
                    if first < last:
                        self.do_what_is_due(state, last, bar)
                except Interrupted as interrupted:
                    raise self.stop(state, interrupted.number) from None
                self.checkpoints.wait()
        self.heed_signals(wait=True)
        return state

    def first_step(self, state: TrainState, bar: tqdm) -> TrainState:
        """Compiles the step, and takes it: it is no measure of speed."""
        bar.set_postfix_str("compiling")
        make = make_train_step
        step = make(self.config, self.definition, self.optimizer, self.mesh, self.feed.streamed)
        given = self.feed.next()
        compiled = Compiled(step, state, *given)
        self.train_step, self.compiling = compiled.call, {"compile_seconds": compiled.seconds}
        self.speed = Speed.of(self.config, self.model_flops(compiled.flops, state, given))
        self.profile.before(0, state)
        state = self.train_step(state, *given)
        bar.set_postfix_str("")
        bar.update(self.several)
        with self.clock.paused(state):
            self.clock.read()
            self.feed.read_waited()
        return state

    def model_flops(self, counted: float | None, state: TrainState, given: Any) -> float | None:
        """Operations of a step of the model: none is counted again that is only repeated.

        Neither rematerialisation nor a loop over the parts of a batch changes what a step is. Where
        the devices do not count, it is counted for a CPU.
        """
        of = self.config
        if counted and not of.model.remat and of.train.accumulate == 1:
            return counted
        plain, mesh = of.copy_and_resolve_references(), devices.cpu_mesh()
        plain.model.remat, plain.train.accumulate = False, 1
        if mesh is None:
            return None
        step = make_train_step(plain, self.definition, self.optimizer, mesh, self.feed.streamed)
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state, *given))
        return flops(step.lower(*like))

    def do_what_is_due(self, state: TrainState, step: int, bar: tqdm) -> None:
        """What belongs to the state after so many steps; raises Interrupted before or within it."""
        self.heed_signals()
        # The log before the checkpoint: what a checkpoint is of has been written down.
        for setting, do in (
            ("log_every", lambda: self.write_log(state, bar)),
            ("sample_every", lambda: self.write_samples(state)),
            ("checkpoint_every", lambda: self.save(state)),
        ):
            if self.is_due(setting, step):
                with self.clock.paused(state):
                    do()

    def next_batch(self, state: TrainState) -> Any:
        """What the step is given; where it can't be read, the state is saved before it is said."""
        try:
            return self.feed.next()
        except (ConfigError, RunError) as error:
            if jax.process_count() > 1:  # the others know nothing of it
                raise
            step = int(state.step)
            self.stop_if_not_finite(state)
            self.checkpoints.save_interrupted(step, state)
            raise RunError(
                f"{error}; step {step} is saved in {self.workdir}, and the same command goes on "
                "from there (without the same images the batches would be others: that needs "
                "config.train.allow_changes=('data.',))"
            ) from error

    def heed_signals(self, wait: bool = False) -> None:
        """Raises Interrupted if a signal has been noted; by any process, soon after, in all."""
        number = self.asked_to_stop(signals.noted(), wait)
        if number:
            raise Interrupted(number, by_all=True)

    def stop(self, state: TrainState, number: int) -> Interrupted:
        """Saves the state as it is, whatever is due after its step; says how to go on."""
        self.stop_if_not_finite(state)
        step = int(state.step)
        self.checkpoints.save_interrupted(step, state)
        told = f"step {step} is saved in {self.workdir}; the same command goes on from there"
        return Interrupted(number, told, by_all=True)

    def is_due(self, setting: str, done: int) -> bool:
        """Whether this is done after so many steps; all of it is after the last."""
        return done % self.config.train[setting] == 0 or done == self.config.train.num_steps

    def write_log(self, state: TrainState, bar: tqdm) -> None:
        """A line of means over the steps since the last one, and of how fast they were."""
        self.checkpoints.check()
        self.stop_if_not_finite(state)
        step, window = int(state.step), jax.device_get(state.window)
        num_steps = int(window.steps) or np.nan  # all may have been skipped
        loss = float(window.loss / num_steps)
        seen = window.quartile_count > 0
        by_quartile = np.where(
            seen, window.quartile_loss / np.maximum(window.quartile_count, 1), np.nan
        )
        may_skip = self.config.train.skip_nonfinite > 0
        speed = self.speed.values(*self.clock.read(), self.feed.read_waited())
        self.log.write(
            step,
            loss=loss,
            grad_norm=float(window.grad_norm / num_steps),
            # The optimizer does not count what was skipped.
            learning_rate=float(self.learning_rate(step - 1 - int(window.skipped_steps))),
            **{f"loss_quartile_{i + 1}": float(mean) for i, mean in enumerate(by_quartile)},
            **({"skipped_steps": int(window.skipped_steps)} if may_skip else {}),
            **speed,
            **self.compiling,
        )
        self.compiling = {}
        bar.set_postfix_str(f"loss {loss:.4f}{self.speed.line(speed)}")

    def write_samples(self, state: TrainState) -> None:
        """A grid of samples from the EMA weights, always of the same noise."""
        step, n = int(state.step), self.config.sample.batch_size
        params = self.averaged(state)
        levels = self.definition.learned(params).schedule.levels(self.config.train.sample_timesteps)
        try:
            with self.may_be_given_up():
                made = self.preview(params, levels, n).x_0
        except RunError as error:  # of the sampler, on a network that may be new: training goes on
            tqdm.write(f"step {step}: no picture of samples ({error})")
            return
        grid = images.grid(to_bytes(self.definition, made))
        images.save_png(self.workdir / "samples" / f"step_{step:08d}.png", grid)
        self.log.image("samples", step, grid)

    def save(self, state: TrainState) -> None:
        """A quick bound on validation, and a checkpoint that remembers it."""
        step = int(state.step)
        self.stop_if_not_finite(state)
        with self.may_be_given_up():
            validation = self.quick_bound(self.averaged(state))
        if not np.isfinite(validation):
            raise RunError(
                f"the bound on validation is {validation} at step {step}; it is not saved"
            )
        self.log.write(step, validation_bits_per_dim=validation)
        tqdm.write(f"step {step}: validation bits/dim {validation:.4f}")
        self.checkpoints.save(step, state, validation)

    def averaged(self, state: TrainState) -> Any:
        """The EMA weights, whole on every device."""
        return devices.place(state.ema_params, devices.replicated(self.mesh))

    def may_be_given_up(self) -> Any:
        """Around what a signal may end: in one process alone, as several do the same or hang."""
        return signals.raising() if jax.process_count() == 1 else nullcontext()

    def stop_if_not_finite(self, state: TrainState) -> None:
        """Raises RunError if a step was not finite and not to be skipped: the state's next one."""
        bad_step = int(state.window.first_bad_step)
        if bad_step < 0:
            return
        given = self.feed.of_step(bad_step - 1)
        described = diagnosis.describe(self.config, self.definition, self.mesh, state, *given)
        latest = self.checkpoints.latest_step()
        kept = "no checkpoint was saved" if latest is None else f"step {latest} is the last saved"
        skipped = int(state.window.skipped_steps)
        kept += f" ({skipped} such steps were skipped before)" if skipped else ""
        raise RunError(
            f"{described}; {kept}; "
            "try a lower config.train.learning_rate or config.train.gradient_clip"
        )
