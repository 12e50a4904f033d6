"""Train states on disk: saved while training goes on, restored bit for bit or not at all."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
from etils import epath
from tqdm import tqdm

from experiments.harness.errors import ConfigError, RunError, in_short
from experiments.harness.processes import distributed
from experiments.harness.workdir import checksums, orbax

CHECKPOINTS = ("best", "latest")
_SUBDIRECTORY = "checkpoints"
_INTERRUPTED = "interrupted"  # what a signal made a run save, between two of its checkpoints
_DAMAGED = "damaged_checkpoints"

Read = TypeVar("Read")


class DamagedError(ConfigError):
    """A checkpoint's files are not what was written."""


class RemovedError(ConfigError):
    """The run that trains here removed the checkpoint while it was being read."""


class Checkpoints:
    """The checkpoints of a work directory: the last few, and the best by a validation metric.

    A context manager; leaving it waits for the save that is under way. A checkpoint appears under
    its step's name only when it is complete, its checksums included, so a kill at any time leaves
    the earlier ones intact and another process may read while this one writes.

    Args:
      workdir: the work directory, local or a bucket; checkpoints lie in its `checkpoints/`.
      keep_last: how many of the latest checkpoints to keep, besides the best one.
      read_only: look but never create, change or remove anything: for evaluation, sampling and warm
        starts, also while another process trains in this work directory.
      setting: the setting that `workdir` came from, for error messages.

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
        # orbax chooses what to keep by the metrics, and can't open a directory with a broken one.
        broken = {
            step: wrong
            for step in orbax.complete_steps(self._directory)
            if (wrong := orbax.damaged_metric(self._directory / str(step)))
        }
        for step, wrong in broken.items():
            self._move_aside(step, wrong)
        self._manager = orbax.open_manager(self._directory, keep_last)
        self._clear_up()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(self, step: int, state: Any, validation: float | None = None) -> bool:
        """Saves `state` in the background; on return its buffers may be donated or overwritten.

        Args:
          step: number of training steps behind `state`.
          state: pytree of arrays.
          validation: metric of this state on validation data, lower is better. Without one, or with
            one that is not finite, the state is never the best.

        Returns:
          Whether a save was started: False if `step` is saved already, and then `validation` too
          stays what it was.

        Raises:
          RunError: it, or an earlier save in the background, failed (a full disk, say).
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

        Of several processes each would see the end at another time; there the next save tells.
        """
        if jax.process_count() > 1:
            return
        if self._is_saving and not self._manager.is_saving_in_progress():
            self.wait()

    def save_interrupted(self, step: int, state: Any) -> None:
        """Saves, completely, where a signal stops a run: a state of which no more is done.

        It is none of the checkpoints that the run makes by itself, and changes nothing of which of
        them are kept; a later one takes its place.

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
        """Steps of the complete checkpoints, ascending; waits for the save that is under way."""
        self.wait()
        interrupted = orbax.complete_steps(self._workdir / _INTERRUPTED)
        steps = sorted({*orbax.complete_steps(self._directory), *interrupted})
        self._seen.update(steps)
        return steps

    def latest_step(self) -> int | None:
        """Step of the latest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Step of the kept checkpoint with the lowest validation metric, the later of equals.

        None if no checkpoint has a metric.
        """
        return next(iter(self._measured()), None)

    def choose(self, which: str) -> int | None:
        """The step of the "best" or the "latest" whose files are as they were written.

        The latest too where none was measured; None where none is good.
        """

        def verified(step: int) -> int:
            self._verify(step)
            return step

        return self.first_good(which, verified)

    def first_good(self, which: str, read: Callable[[int], Read]) -> Read | None:
        """What `read` makes of the best or the latest checkpoint; of a damaged one, of the next.

        It says which are damaged, and moves them aside unless it may only read.
        """
        steps = self.steps()[::-1]
        if which == "best":
            steps = list(dict.fromkeys([*self._measured(), *steps]))
        for step in steps:
            try:
                return read(step)
            except DamagedError as error:
                self._set_aside(step, str(error))
        return None

    def was_interrupted(self, step: int) -> bool:
        """Whether a signal made this one: what is due after its step is still to be done."""
        return self._path(step).parent.name == _INTERRUPTED

    def restore(self, step: int, like: Any) -> Any:
        """The whole state saved at `step`, bit for bit.

        Args:
          step: step of a complete checkpoint.
          like: pytree of jax.Arrays or jax.ShapeDtypeStructs, with the structure, shapes and dtypes
            of the saved state. Each array comes back with the sharding of its leaf here, however it
            was sharded when saved; without one, on this process's first device. A NumPy leaf comes
            back as NumPy.

        Returns:
          A pytree of the structure of `like`.

        Raises:
          ConfigError: no such step, or the checkpoint differs from `like` in structure, shape or
            dtype (it is of another architecture).
          DamagedError: its files are not what was written.
          RemovedError: it went while it was being read.
        """
        return self._restore(step, like, part=None)

    def restore_part(self, step: int, part: str, like: Any) -> Any:
        """One field of the state saved at `step`, such as `ema_params`, without reading the rest.

        Args:
          step: step of a complete checkpoint.
          part: name of a field (or, for a dictionary, key) of the saved state.
          like: as for `restore`, of that field alone; of a dictionary, of the keys that are wanted.

        Returns:
          A pytree of the structure of `like`.

        Raises:
          ConfigError: as for `restore`, and the others.
        """
        return self._restore(step, like, part)

    def wait(self) -> None:
        """Returns once the save under way is complete; raises RunError if it failed."""
        if self._manager is None:
            return
        with self._writing(self._last_saved):
            self._is_saving = False
            self._manager.wait_until_finished()
            self._clear_up()

    def close(self) -> None:
        """Waits for the save under way, then releases threads and files."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()

    def _clear_up(self) -> None:
        """Deletes what was removed, and what a signal made a run save if it has got further since.

        The latter too goes by its name first, so that a reader finds it whole or not at all.
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

    def _restore(self, step: int, like: Any, part: str | None) -> Any:
        was_there, steps = step in self._seen, self.steps()
        if step not in steps and was_there:
            raise self._removed(step)
        if not steps:
            raise self._no_checkpoint()
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise ConfigError(f"step={step}: {self._name} has checkpoints at steps {known}")
        self._verify(step)
        with self._while_it_exists(step):
            try:
                return orbax.read(self._path(step) / orbax.ITEM, like, part)
            except orbax.DifferentError as error:
                raise ConfigError(
                    f"{self._name}: the checkpoint at step {step} is of another architecture: "
                    f"{error}: use the config it was trained with, or another work directory"
                ) from error

    def _verify(self, step: int) -> None:
        """Raises DamagedError unless the files are as they were written."""
        with self._while_it_exists(step):
            wrong = checksums.damage(self._path(step))
            if wrong and self._path(step).exists():
                raise DamagedError(wrong)
            if wrong:
                raise FileNotFoundError(wrong)

    @contextmanager
    def _while_it_exists(self, step: int) -> Iterator[None]:
        path = self._path(step)
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            if not path.exists():
                raise self._removed(step) from error
            if checksums.are_written(path) or isinstance(error, RuntimeError | MemoryError):
                raise  # not for what is in the files
            raise DamagedError(f"it can't be read: {in_short(error)}") from error

    def _path(self, step: int) -> epath.Path:
        own, interrupted = (self._workdir / d / str(step) for d in (_SUBDIRECTORY, _INTERRUPTED))
        return own if own.exists() or not interrupted.exists() else interrupted

    def _measured(self) -> list[int]:
        """The steps that have a metric, the best first."""
        self.wait()
        steps = orbax.complete_steps(self._directory)
        found = {step: orbax.validation_of(self._directory / str(step)) for step in steps}
        return sorted((s for s in steps if math.isfinite(found[s])), key=lambda s: (found[s], -s))

    def _set_aside(self, step: int, wrong: str) -> None:
        """Says that a checkpoint is damaged, and moves it out of the way of a run."""
        if self._manager is None:
            tqdm.write(f"{self._damaged(step, wrong)}; going on without it")
        else:
            self._move_aside(step, wrong)
            self._manager.reload()

    def _move_aside(self, step: int, wrong: str) -> None:
        distributed.wait_for_all(f"damage of {step} is seen")
        if distributed.is_first():
            self._rename_damaged(step, wrong)
        distributed.wait_for_all(f"{step} is moved")

    def _rename_damaged(self, step: int, wrong: str) -> None:
        directory = self._workdir / _DAMAGED
        directory.mkdir(exist_ok=True)
        taken = {path.name for path in directory.iterdir()}
        names = (f"{step}.{i}" if i else f"{step}" for i in itertools.count())
        target = directory / next(name for name in names if name not in taken)
        self._path(step).rename(target)
        tqdm.write(f"{self._damaged(step, wrong)}; it was moved to {target}")

    def _damaged(self, step: int, wrong: str) -> str:
        return f"warning: {self._name}: the checkpoint at step {step} is damaged ({wrong})"

    def _require_writing(self) -> None:
        if self._manager is None:
            raise RuntimeError(f"{self._name} was opened with read_only=True: it cannot save")

    @contextmanager
    def _writing(self, step: int, directory: epath.Path | None = None) -> Iterator[None]:
        """An error of the body as one line."""
        directory = directory or self._directory
        try:
            yield
        except Exception as error:
            places = (self._directory, self._workdir / _INTERRUPTED)
            complete = {s for place in places for s in orbax.complete_steps(place)}
            earlier = complete - {step}
            kept = f"those up to step {max(earlier)} are intact" if earlier else "there is no other"
            raise RunError(
                f"{self._name}: the checkpoint at step {step} could not be written to "
                f"{directory} ({in_short(error)}); {kept}; once it can, the same command goes "
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


def is_new(workdir: epath.PathLike) -> bool:
    """Whether a work directory has no complete checkpoint yet; changes nothing there."""
    try:
        with Checkpoints(workdir, read_only=True):
            return False
    except ConfigError:
        return True


def _remove(directory: epath.Path) -> None:
    if directory.exists():
        directory.rmtree()
