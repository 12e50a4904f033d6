"""Train states on disk: saved while training goes on, restored bit for bit or not at all."""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
from etils import epath
from tqdm import tqdm

from experiments.harness.errors import ConfigError, RunError, in_short
from experiments.harness.processes import distributed
from experiments.harness.workdir import checksums, orbax

_SUBDIRECTORY = "checkpoints"
_INTERRUPTED = "interrupted"  # the state that a run saves when a signal stops it
_DAMAGED = "damaged_checkpoints"

Read = TypeVar("Read")


class DamagedError(ConfigError):
    """The files of a checkpoint differ from those that were written."""


class RemovedError(ConfigError):
    """A training run removed the checkpoint while it was being read."""


class Checkpoints:
    """The checkpoints of a work directory: the last few, and the best by a validation metric.

    A context manager; on exit it waits for the current save. A checkpoint gets its step's name
    only when it is complete, its checksums included. So a kill at any time leaves the earlier ones
    intact, and another process may read while this one writes.

    Args:
      workdir: the work directory, local or a bucket; the checkpoints are in its `checkpoints/`.
      keep_last: how many of the latest checkpoints to keep, besides the best one.
      read_only: create, change and remove nothing: for evaluation, sampling and warm starts, also
        while another process trains in this work directory.
      setting: the setting that named `workdir`, for error messages.

    Raises:
      ConfigError: the directory cannot be written, or (read_only) it holds no checkpoint.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep_last: int = 3,
        read_only: bool = False,
        setting: str = "workdir",
    ):
        check_path(workdir, setting)
        self._name = f"{setting}={workdir}"
        self._workdir = epath.Path(workdir).resolve()
        self._directory = self._workdir / _SUBDIRECTORY
        self._manager, self._last_saved, self._is_saving = None, -1, False
        self._seen: set[int] = set()
        if read_only:
            if not self.steps():
                raise self._no_checkpoint()
            return
        self._create_directory()
        # orbax reads every metric to decide what to keep, and fails at a damaged one.
        for step in orbax.complete_steps(self._directory):
            if damage := orbax.damaged_metric(self._directory / str(step)):
                self._move_aside(step, damage)
        self._manager = orbax.open_manager(self._directory, keep_last)
        self._clear_up()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(self, step: int, state: Any, validation: float | None = None) -> bool:
        """Saves `state` in the background; on return its buffers may be donated or overwritten.

        Args:
          step: number of training steps that led to `state`.
          state: pytree of arrays.
          validation: metric of this state on validation data; lower is better. A state without a
            finite metric is never the best.

        Returns:
          Whether a save was started. If `step` was saved before, its checkpoint stays as it is.

        Raises:
          RunError: this save, or an earlier one in the background, failed (a full disk, say).
        """
        self._require_writing()
        self.wait()
        if step in orbax.complete_steps(self._directory):
            return False
        metrics = {}
        if validation is not None and math.isfinite(validation):
            metrics[orbax.METRIC] = float(validation)
        with self._writing(step):
            orbax.start_save(self._manager, step, state, metrics)
        self._last_saved, self._is_saving = step, True
        return True

    def check(self) -> None:
        """Raises RunError if a save in the background has failed; does not wait.

        Several processes would see the end at different times; there the next save reports it.
        """
        if (
            jax.process_count() == 1
            and self._is_saving
            and not self._manager.is_saving_in_progress()
        ):
            self.wait()

    def save_interrupted(self, step: int, state: Any) -> None:
        """Saves the state of a run that a signal stops, and waits until it is complete.

        The tasks scheduled after this step, such as validation, are still to do. The state lies
        beside the run's own checkpoints, and has no influence on which of them are kept. The next
        own checkpoint replaces it.

        Raises:
          RunError: as for `save`.
        """
        self._require_writing()
        self.wait()
        directory = self._workdir / _INTERRUPTED
        directory.mkdir(exist_ok=True)
        with self._writing(step, directory):
            manager = orbax.open_manager(directory, keep_last=1)
            try:
                orbax.start_save(manager, step, state, {})
            finally:
                manager.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; waits for the current save."""
        self.wait()
        interrupted = orbax.complete_steps(self._workdir / _INTERRUPTED)
        steps = sorted({*orbax.complete_steps(self._directory), *interrupted})
        self._seen.update(steps)
        return steps

    def latest_step(self) -> int | None:
        """Step of the latest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Step with the lowest validation metric, the later of equals; None without metrics."""
        return next(iter(self._measured()), None)

    def choose(self, which: str) -> int | None:
        """Step of the "best" or the "latest" checkpoint without damage; None if there is none.

        Without any metric the latest is the best.
        """

        def verified(step: int) -> int:
            self._verify(step)
            return step

        return self.first_good(which, verified)

    def first_good(self, which: str, read: Callable[[int], Read]) -> Read | None:
        """Applies `read` to the best or the latest checkpoint; to the next one if it is damaged.

        Prints a warning for each damaged checkpoint, and moves it aside unless this is read-only.

        Args:
          which: "best" or "latest".
          read: from a step to a value; raises DamagedError.

        Returns:
          The value; None if no checkpoint is good.
        """
        steps = self.steps()[::-1]
        if which == "best":
            steps = list(dict.fromkeys([*self._measured(), *steps]))
        for step in steps:
            try:
                return read(step)
            except DamagedError as error:
                if self._manager is None:
                    warning = self._damage_warning(step, str(error))
                    tqdm.write(f"{warning}; going on without it")
                else:
                    self._move_aside(step, str(error))
                    self._manager.reload()
        return None

    def was_interrupted(self, step: int) -> bool:
        """Whether this is the state of a stopped run: its scheduled tasks are still to do."""
        return self._path(step).parent.name == _INTERRUPTED

    def restore(self, step: int, like: Any, part: str | None = None) -> Any:
        """The state saved at `step`, or one field of it, bit for bit.

        Args:
          step: step of a complete checkpoint.
          like: pytree of jax.Arrays or jax.ShapeDtypeStructs with the structure, shapes and dtypes
            of the saved state. Each array is restored with the sharding of its leaf here, or on
            this process's first device if the leaf has none. A NumPy leaf is restored as NumPy.
          part: name of a field, such as `ema_params`: `like` describes that field alone (of a
            dictionary perhaps some keys), and the rest is not read. None: the whole state.

        Returns:
          A pytree of the structure of `like`.

        Raises:
          ConfigError: there is no such step, or the checkpoint differs from `like` in structure,
            shape or dtype (it is of another architecture).
          DamagedError: its files differ from those that were written.
          RemovedError: it was removed while it was being read.
        """
        was_seen, steps = step in self._seen, self.steps()
        if step not in steps and was_seen:
            raise self._removed(step)
        if not steps:
            raise self._no_checkpoint()
        if step not in steps:
            raise ConfigError(
                f"step={step}: {self._name} has checkpoints at steps {', '.join(map(str, steps))}"
            )
        self._verify(step)
        with self._while_it_exists(step):
            try:
                return orbax.read(self._path(step) / orbax.ITEM, like, part)
            except orbax.DifferentError as error:
                raise ConfigError(
                    f"{self._name}: the checkpoint at step {step} is of another architecture: "
                    f"{error}: use the config of its training, or another work directory"
                ) from error

    def wait(self) -> None:
        """Waits until the current save is complete; raises RunError if it failed."""
        if self._manager is None:
            return
        with self._writing(self._last_saved):
            was_saving, self._is_saving = self._is_saving, False
            self._manager.wait_until_finished()
            self._clear_up()
            if was_saving:
                orbax.check_opens(self._path(self._last_saved) / orbax.ITEM)

    def close(self) -> None:
        """Waits for the current save, then releases threads and files."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()

    def _clear_up(self) -> None:
        """Deletes removed checkpoints, and the state of a stopped run once an own one is as late.

        That state is renamed first, so that a reader finds it whole or not at all.
        """
        if not distributed.is_first():
            return
        removed, interrupted = self._directory / orbax.REMOVED, self._workdir / _INTERRUPTED
        _remove(removed)
        places = (interrupted, self._directory)
        latest, own = (max(orbax.complete_steps(place), default=-1) for place in places)
        if interrupted.exists() and latest <= own:
            removed.mkdir()
            interrupted.rename(removed / _INTERRUPTED)
            _remove(removed)

    def _verify(self, step: int) -> None:
        """Raises DamagedError unless the files agree with their checksums."""
        with self._while_it_exists(step):
            if damage := checksums.damage(self._path(step)):
                raise DamagedError(damage)

    @contextmanager
    def _while_it_exists(self, step: int) -> Iterator[None]:
        """Turns errors of reading into RemovedError or DamagedError."""
        path = self._path(step)
        try:
            yield
        except Exception as error:
            if not path.exists():
                raise self._removed(step) from error
            is_explained = checksums.are_written(path) or isinstance(error, ConfigError)
            if is_explained or isinstance(error, RuntimeError | MemoryError):
                raise  # the files are not the cause, or the error names it
            raise DamagedError(f"it can't be read: {in_short(error)}") from error

    def _path(self, step: int) -> epath.Path:
        own, interrupted = (self._workdir / d / str(step) for d in (_SUBDIRECTORY, _INTERRUPTED))
        return own if own.exists() or not interrupted.exists() else interrupted

    def _measured(self) -> list[int]:
        """The steps that have a metric, the best first."""
        self.wait()
        steps = orbax.complete_steps(self._directory)
        metric = {step: orbax.validation_of(self._directory / str(step)) for step in steps}
        measured = [step for step in steps if math.isfinite(metric[step])]
        return sorted(measured, key=lambda step: (metric[step], -step))

    def _move_aside(self, step: int, damage: str) -> None:
        """Moves a damaged checkpoint to damaged_checkpoints/ and prints a warning."""
        distributed.wait_for_all(f"damage of {step} is seen")
        if distributed.is_first():
            directory = self._workdir / _DAMAGED
            directory.mkdir(exist_ok=True)
            names = (f"{step}.{i}" if i else f"{step}" for i in itertools.count())
            target = next(directory / n for n in names if not (directory / n).exists())
            self._path(step).rename(target)
            tqdm.write(f"{self._damage_warning(step, damage)}; it was moved to {target}")
        distributed.wait_for_all(f"{step} is moved")

    def _damage_warning(self, step: int, damage: str) -> str:
        return f"warning: {self._name}: the checkpoint at step {step} is damaged ({damage})"

    def _require_writing(self) -> None:
        if self._manager is None:
            raise RuntimeError(f"{self._name} was opened with read_only=True: it cannot save")

    @contextmanager
    def _writing(self, step: int, directory: epath.Path | None = None) -> Iterator[None]:
        """Turns an error of saving into a RunError of one line."""
        directory = directory or self._directory
        try:
            yield
        except Exception as error:
            places = (self._directory, self._workdir / _INTERRUPTED)
            complete = {s for place in places for s in orbax.complete_steps(place)}
            earlier = complete - {step}
            rest = f"those up to step {max(earlier)} are intact" if earlier else "there is no other"
            raise RunError(
                f"{self._name}: the checkpoint at step {step} could not be written to "
                f"{directory} ({in_short(error)}); {rest}; once it can, the same command goes "
                "on from there"
            ) from error

    def _create_directory(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self._name} cannot be written ({error.strerror}): it must be a directory that "
                "you may write to, or one that can be created"
            ) from error

    def _removed(self, step: int) -> RemovedError:
        return RemovedError(
            f"{self._name}: the checkpoint at step {step} was removed while it was being read: "
            "training goes on there and replaced it; run this again"
        )

    def _no_checkpoint(self) -> ConfigError:
        return ConfigError(
            f"{self._name} holds no checkpoint (looked in {self._directory}): it must be the work "
            "directory of a training run that has saved one; train first"
        )


def check_path(workdir: epath.PathLike, setting: str = "workdir") -> None:
    """Raises ConfigError for a directory in which orbax could save, but not restore.

    It takes the directory's name for a pattern of file names.
    """
    path = os.fspath(epath.Path(workdir).resolve())
    if wrong := sorted(set(path) & set("*?[\\")):
        raise ConfigError(
            f"{setting}={workdir}: checkpoints cannot be read in a directory with "
            f"{' or '.join(wrong)} in its path, {path}; give another directory"
        )


def is_new(workdir: epath.PathLike) -> bool:
    """Whether a work directory has no complete checkpoint yet; changes nothing there."""
    places = (epath.Path(workdir) / name for name in (_SUBDIRECTORY, _INTERRUPTED))
    return not any(orbax.complete_steps(place) for place in places)


def _remove(directory: epath.Path) -> None:
    if directory.exists():
        directory.rmtree()
