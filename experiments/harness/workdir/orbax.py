"""Saving and restoring pytrees with orbax: bit for bit, or not at all."""

import json
import logging
import math
from contextlib import suppress
from typing import Any

import jax
import numpy as np
from etils import epath

from experiments.harness.errors import in_short
from experiments.harness.processes import distributed
from experiments.harness.workdir import checksums

ITEM = "default"  # the part of a checkpoint that is the state
METRIC = "validation"
REMOVED = "removed"  # a checkpoint is renamed to here before its files are deleted
_METRIC_FILE = "metrics/metrics"
_DIFFERENCES_SHOWN = 3


class DifferentError(Exception):
    """A saved pytree has not the expected structure, shapes and dtypes."""


def read(item: epath.Path, like: Any, part: str | None) -> Any:
    """A saved pytree, or one field of it.

    Args:
      item: the directory that orbax wrote.
      like: pytree of arrays or jax.ShapeDtypeStructs; where `part` is a dictionary, it may leave
        out keys.
      part: name of a field of the saved pytree; None for all of it.

    Raises:
      DifferentError: with the first differences.
    """
    import orbax.checkpoint as ocp

    wanted = {_key(path, part): leaf for path, leaf in _leaves(like)}
    handler = ocp.PyTreeCheckpointHandler()
    stored = handler.metadata(item).tree
    if part is not None:
        stored = {part: stored[part]} if part in stored else {}
    if part in stored and isinstance(like, dict) and isinstance(stored[part], dict):
        # A network, for instance, without the schedule that was learned with it.
        stored[part] = {k: tree for k, tree in stored[part].items() if k in like}
    _require_same(stored, wanted)
    # orbax stores NamedTuples as dictionaries, and wants the target in its own structure.
    target = jax.tree_util.tree_map_with_path(
        lambda path, _: _on_device(wanted[_key(path)]), stored
    )
    args = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=part is not None,
    )
    restored = handler.restore(item, args=args) if wanted else {}
    handler.close()
    by_name = {_key(path): leaf for path, leaf in _leaves(restored)}
    return jax.tree.unflatten(jax.tree.structure(like), [by_name[name] for name in wanted])


def check_opens(item: epath.Path) -> None:
    """Reads the smallest field of a saved pytree; raises the error of reading, if any."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    stored = handler.metadata(item).tree
    handler.close()
    sizes = {
        name: sum(math.prod(leaf.shape) for _, leaf in leaves)
        for name in stored
        if (leaves := _leaves(stored[name]))
    }
    part = min(sizes, key=sizes.get)
    read(item, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), stored[part]), part)


def _require_same(stored: Any, wanted: dict[str, Any]) -> None:
    there = {_key(path): _describe(leaf) for path, leaf in _leaves(stored)}
    here = {name: _describe(leaf) for name, leaf in wanted.items()}
    differences = [
        f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in here | there
        if here.get(name) != there.get(name)
    ]
    more = len(differences) - _DIFFERENCES_SHOWN
    if differences:
        shown = "; ".join(differences[:_DIFFERENCES_SHOWN])
        raise DifferentError(shown + (f"; and {more} more" if more > 0 else ""))


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


def open_manager(directory: epath.Path, keep_last: int) -> Any:
    """orbax's manager of a directory, which keeps the last few checkpoints and the best."""
    import orbax.checkpoint as ocp

    class Handler(ocp.PyTreeCheckpointHandler):
        def finalize(self, directory: epath.Path) -> None:
            try:
                super().finalize(directory)
                if distributed.is_first():
                    checksums.write(epath.Path(directory))
            except Exception as error:
                # One process reports this at the next save; several would block one another there.
                distributed.end_all(f"{directory} could not be written ({in_short(error)})")
                raise

    # orbax logs the trace of an error that it also raises.
    logging.getLogger("absl").addFilter(lambda r: not (r.exc_info and "orbax" in r.pathname))
    policies = ocp.checkpoint_managers
    best = policies.BestN(
        get_metric_fn=_metric, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    keep = policies.AnyPreservationPolicy([policies.LatestN(keep_last), best])
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = Handler()
    registry.add(ITEM, ocp.args.PyTreeSave, handler)
    registry.add(ITEM, ocp.args.PyTreeRestore, handler)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        best_fn=_metric,
        best_mode="min",
        create=False,
        cleanup_tmp_directories=True,  # left by a killed save
        todelete_subdir=REMOVED,
    )
    return ocp.CheckpointManager(directory, options=options, handler_registry=registry)


def start_save(manager: Any, step: int, state: Any, metrics: dict[str, float]) -> None:
    """Starts to save; on return the state's buffers may be donated or overwritten."""
    import orbax.checkpoint as ocp

    # `force`: the caller decides when to save, not a policy of orbax.
    manager.save(step, args=ocp.args.PyTreeSave(state), metrics=metrics, force=True)


def complete_steps(directory: epath.Path) -> list[int]:
    """The steps of a directory's complete checkpoints, ascending."""
    from orbax.checkpoint.utils import is_checkpoint_finalized

    if not directory.exists():
        return []
    steps = []
    for path in directory.iterdir():
        # An incomplete save has another name; in a bucket it has this name and lacks a file.
        if path.name.isdigit():
            with suppress(ValueError, FileNotFoundError):  # it was removed meanwhile
                if is_checkpoint_finalized(path):
                    steps.append(int(path.name))
    return sorted(steps)


def damaged_metric(checkpoint: epath.Path) -> str | None:
    """The damage to the file of a checkpoint's metric, in a few words; None if there is none."""
    if damage := checksums.damage(checkpoint, _METRIC_FILE):
        return damage
    try:
        path = checkpoint / _METRIC_FILE
        if not path.exists() or isinstance(json.loads(path.read_bytes()), dict):
            return None
    except ValueError:
        pass
    return checksums.changed(_METRIC_FILE)


def validation_of(checkpoint: epath.Path) -> float:
    """The metric of a checkpoint on disk; infinite if it has none or a damaged one."""
    path = checkpoint / _METRIC_FILE
    try:
        if damaged_metric(checkpoint) or not path.exists():
            return math.inf
        return _metric(json.loads(path.read_bytes()))
    except FileNotFoundError:  # it was removed meanwhile
        return math.inf


def _metric(metrics: dict[str, float] | None) -> float:
    return (metrics or {}).get(METRIC, math.inf)
