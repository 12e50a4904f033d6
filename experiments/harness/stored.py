"""Checkpoints as they lie in a directory: saved by orbax with checksums, listed, measured."""

import json
import logging
import math
from contextlib import suppress
from typing import Any

from etils import epath

from experiments.harness import checksums, devices
from experiments.harness.errors import in_short

ITEM = "default"  # the part of a checkpoint that is the state
METRIC = "validation"
REMOVED = "removed"  # where one goes before it is deleted: it is there whole, or not at all
_METRIC_FILE = "metrics/metrics"


def _is_news(record: logging.LogRecord) -> bool:
    """Not the trace of an error that orbax also raises."""
    return not (record.exc_info and "orbax" in record.pathname)


def open_manager(directory: epath.Path, keep_last: int) -> Any:
    """orbax's manager of a directory, which keeps the last few and the best."""
    import orbax.checkpoint as ocp

    class Handler(ocp.PyTreeCheckpointHandler):
        def finalize(self, directory: epath.Path) -> None:
            try:
                super().finalize(directory)
                if devices.is_first():
                    checksums.write(epath.Path(directory))
            except Exception as error:
                # In one process the next save tells; several would wait for one another for ever.
                devices.end_all(f"{directory} could not be written ({in_short(error)})")
                raise

    logging.getLogger("absl").addFilter(_is_news)
    policies = ocp.checkpoint_managers
    keep = policies.AnyPreservationPolicy(
        [
            policies.LatestN(keep_last),
            policies.BestN(
                get_metric_fn=_metric,
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = Handler()
    registry.add(ITEM, ocp.args.PyTreeSave, handler)
    registry.add(ITEM, ocp.args.PyTreeRestore, handler)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        best_fn=_metric,
        best_mode="min",
        create=False,
        cleanup_tmp_directories=True,  # what a killed save left
        todelete_subdir=REMOVED,
    )
    return ocp.CheckpointManager(directory, options=options, handler_registry=registry)


def start_save(manager: Any, step: int, state: Any, metrics: dict[str, float]) -> None:
    """Begins to save; on return the state's buffers may be donated or overwritten."""
    import orbax.checkpoint as ocp

    # Whether it is time to save is the caller's decision: force leaves it to no policy.
    manager.save(step, args=ocp.args.PyTreeSave(state), metrics=metrics, force=True)


def complete_steps(directory: epath.Path) -> list[int]:
    """The steps of a directory's complete checkpoints, ascending."""
    from orbax.checkpoint.utils import is_checkpoint_finalized

    if not directory.exists():
        return []
    found = []
    for path in directory.iterdir():
        # A save under way has another name; in a bucket it has this one, and lacks a file.
        if path.name.isdigit():
            with suppress(ValueError, FileNotFoundError):  # removed since
                if is_checkpoint_finalized(path):
                    found.append(int(path.name))
    return sorted(found)


def damaged_metric(checkpoint: epath.Path) -> str | None:
    """What is wrong with the file of a checkpoint's metric; None if nothing is."""
    if wrong := checksums.damage_of(checkpoint, _METRIC_FILE):
        return wrong
    try:
        path = checkpoint / _METRIC_FILE
        if not path.exists() or isinstance(json.loads(path.read_bytes()), dict):
            return None
    except ValueError:
        pass
    return f"{_METRIC_FILE} is not as it was written"


def validation_of(checkpoint: epath.Path) -> float:
    """The metric of a checkpoint on disk; infinite where it has none that can be trusted."""
    path = checkpoint / _METRIC_FILE
    try:
        if damaged_metric(checkpoint) or not path.exists():
            return math.inf
        return _metric(json.loads(path.read_bytes()))
    except FileNotFoundError:  # removed since
        return math.inf


def _metric(metrics: dict[str, float] | None) -> float:
    return (metrics or {}).get(METRIC, math.inf)
