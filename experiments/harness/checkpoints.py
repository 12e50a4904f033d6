"""Train states on disk: saved while training goes on, restored bit for bit or not at all."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from etils import epath

from experiments.harness.errors import ConfigError

CHECKPOINTS = ("best", "latest")
_SUBDIRECTORY = "checkpoints"
_METRIC = "validation"
_DIFFERENCES_SHOWN = 3
_LISTINGS = 5


class Checkpoints:
    """The checkpoints of a work directory: the last few, and the best by a validation metric.

    A context manager; leaving it waits for the save that is under way. A checkpoint appears under
    its step's name only when it is complete, so a kill at any time leaves the earlier ones intact
    and another process may read while this one writes.

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
        self._directory = epath.Path(workdir).resolve() / _SUBDIRECTORY
        self._read_only = read_only
        if read_only:
            self._require_directory()
        else:
            self._create_directory()
        self._manager = _open_manager(self._directory, keep_last, read_only)
        if read_only and not self._manager.all_steps():
            self._manager.close()
            raise self._no_checkpoint()

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
          Exception: an earlier save failed in the background (a full disk, say).
        """
        import orbax.checkpoint as ocp

        if self._read_only:
            raise RuntimeError(f"{self._name} was opened with read_only=True: it cannot save")
        if step in self.steps():
            return False
        metrics = {}
        if validation is not None and math.isfinite(validation):
            metrics[_METRIC] = float(validation)
        # Whether it is time to save is the caller's decision: force leaves it to no policy.
        self._manager.save(step, args=ocp.args.PyTreeSave(state), metrics=metrics, force=True)
        return True

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; waits for the save that is under way."""
        self.wait()
        return list(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Step of the latest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Step of the kept checkpoint with the lowest validation metric, the later of equals.

        None if no checkpoint has a metric.
        """
        measured = {s: _validation(self._manager.metrics(s)) for s in self.steps()}
        best = min(measured.values(), default=math.inf)
        return None if best == math.inf else max(s for s in measured if measured[s] == best)

    def choose(self, which: str) -> int | None:
        """The step of the "best" or the "latest"; the latest too where none was measured."""
        best = self.best_step() if which == "best" else None
        return self.latest_step() if best is None else best

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
          ConfigError: as for `restore`.
        """
        return self._restore(step, like, part)

    def wait(self) -> None:
        """Returns once the save under way is complete; raises what made it fail, if it failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way, then releases threads and files."""
        self._manager.close()

    def _restore(self, step: int, like: Any, part: str | None) -> Any:
        import orbax.checkpoint as ocp

        steps = self.steps()
        if not steps:
            raise self._no_checkpoint()
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise ConfigError(f"step={step}: {self._name} has checkpoints at steps {known}")
        wanted = {_key(path, part): leaf for path, leaf in _leaves(like)}
        with self._while_it_exists(step):
            stored = self._manager.metadata(step).item_metadata.tree
            if part is not None:
                stored = {part: stored[part]} if part in stored else {}
            if part in stored and isinstance(like, dict) and isinstance(stored[part], dict):
                # Such as a network without the schedule that was learned beside it.
                stored[part] = {k: tree for k, tree in stored[part].items() if k in like}
            self._require_same(step, stored, wanted)
            # Asked for in the checkpoint's own structure, which knows no NamedTuples.
            target = jax.tree_util.tree_map_with_path(
                lambda path, _: _on_device(wanted[_key(path)]), stored
            )
            args = ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=part is not None,
            )
            restored = self._manager.restore(step, args=args) if wanted else {}
        by_name = {_key(path): leaf for path, leaf in _leaves(restored)}
        return jax.tree.unflatten(jax.tree.structure(like), [by_name[name] for name in wanted])

    def _require_same(self, step: int, stored: Any, wanted: dict[str, Any]) -> None:
        there = {_key(path): _describe(leaf) for path, leaf in _leaves(stored)}
        here = {name: _describe(leaf) for name, leaf in wanted.items()}
        different = [
            f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
            for name in here | there
            if here.get(name) != there.get(name)
        ]
        if not different:
            return
        more = len(different) - _DIFFERENCES_SHOWN
        raise ConfigError(
            f"{self._name}: the checkpoint at step {step} is of another architecture: "
            + "; ".join(different[:_DIFFERENCES_SHOWN])
            + (f"; and {more} more" if more > 0 else "")
            + ": use the config it was trained with, or another work directory"
        )

    @contextmanager
    def _while_it_exists(self, step: int) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            if (self._directory / str(step)).exists():
                raise
            raise ConfigError(
                f"{self._name}: the checkpoint at step {step} was removed while it was being read: "
                "training goes on there and replaced it; run this again"
            ) from error

    def _require_directory(self) -> None:
        if not self._directory.is_dir():
            raise self._no_checkpoint()

    def _create_directory(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self._name} cannot be written ({error.strerror}): it must be a directory that "
                "you may write to, or one that can be created"
            ) from error

    def _no_checkpoint(self) -> ConfigError:
        return ConfigError(
            f"{self._name} holds no checkpoint (looked in {self._directory}): it must be the work "
            "directory of a training run that has saved one; train first"
        )


def _open_manager(directory: epath.Path, keep_last: int, read_only: bool) -> Any:
    import orbax.checkpoint as ocp

    policies = ocp.checkpoint_managers
    keep = policies.AnyPreservationPolicy(
        [
            policies.LatestN(keep_last),
            policies.BestN(
                get_metric_fn=_validation,
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = ocp.PyTreeCheckpointHandler()
    registry.add("default", ocp.args.PyTreeSave, handler)
    registry.add("default", ocp.args.PyTreeRestore, handler)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        best_fn=_validation,
        best_mode="min",
        create=False,
        # What a killed save left; a reader must not take the save of a running one for that.
        cleanup_tmp_directories=not read_only,
    )
    for _ in range(_LISTINGS - 1):
        # Listing fails if the process that trains here removes a checkpoint meanwhile.
        with suppress(FileNotFoundError):
            return ocp.CheckpointManager(directory, options=options, handler_registry=registry)
    return ocp.CheckpointManager(directory, options=options, handler_registry=registry)


def _validation(metrics: dict[str, float] | None) -> float:
    return (metrics or {}).get(_METRIC, math.inf)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _key(path: Any, part: str | None = None) -> str:
    """A leaf's name, the same for a field, a key and an index: `opt_state/0/mu/conv/kernel`."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return "/".join(filter(None, [part, name]))


def _describe(leaf: Any) -> str:
    return f"{tuple(leaf.shape)} {np.dtype(leaf.dtype)}"


def _on_device(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def is_new(workdir: epath.PathLike) -> bool:
    """Whether a work directory has no complete checkpoint yet; changes nothing there."""
    try:
        with Checkpoints(workdir, read_only=True):
            return False
    except ConfigError:
        return True


def load_ema(
    workdir: epath.PathLike, which: str, like: Any, setting: str = "workdir"
) -> tuple[Any, int]:
    """The averaged weights of a work directory, and the step they are of; changes nothing there.

    Args:
      workdir: a work directory, also one that is still training.
      which: "best" (on validation; the latest where none was measured) or "latest".
      like: the parameters' shapes and dtypes.
      setting: where `workdir` was given, for error messages.

    Raises:
      ConfigError: for a directory without checkpoints, or of another architecture.
    """
    with Checkpoints(workdir, read_only=True, setting=setting) as checkpoints:
        step = checkpoints.choose(which)
        return checkpoints.restore_part(step, "ema_params", like), step
