"""What made a result: the versions, the code and the devices, with the time that it took."""

import datetime
import functools
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from etils import epath

from experiments.harness.workdir.files import append_jsonl

SESSIONS_FILE = "sessions.jsonl"
_ROOT = Path(__file__).parents[3]
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def environment(params: Any) -> dict[str, Any]:
    """The versions, the git commit, the devices, the number of parameters and the time now.

    Args:
      params: pytree of arrays.
    """
    return {
        "time": _now(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        **_commit(),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }


@contextmanager
def recorded(workdir: epath.PathLike, step: int, params: Any) -> Iterator[None]:
    """Appends a line to sessions.jsonl before the body, and its wall time after it.

    A killed session has the first line alone. A run from step 0 begins a new file.

    Args:
      workdir: the work directory.
      step: the training step that the session starts from.
      params: pytree of arrays.
    """
    path, start = epath.Path(workdir) / SESSIONS_FILE, time.monotonic()
    if step == 0:
        path.unlink(missing_ok=True)
    append_jsonl(path, {"event": "start", "step": step, **environment(params)})
    outcome = "finished"
    try:
        yield
    except BaseException as error:
        outcome = type(error).__name__
        raise
    finally:
        seconds = round(time.monotonic() - start, 1)
        line = {"event": "end", "time": _now(), "seconds": seconds, "outcome": outcome}
        with suppress(OSError):  # a full disk, which the body's own error names
            append_jsonl(path, line)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache
def _commit() -> dict[str, Any]:
    """The commit of the code, and whether tracked files differ from it; None where it has none."""
    try:
        if not (_ROOT / ".git").exists():
            return {"commit": None, "is_changed": None}
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "is_changed": bool(_git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "is_changed": None}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
