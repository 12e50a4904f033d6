"""Numbers written down as they come: `metrics.jsonl`, TensorBoard events, JSON files.

All JSON here is strict: what is not finite becomes null. Where several processes run together the
first one writes, and the same call does nothing in the others.
"""

import io
import json
import math
import os
import time
from typing import Any

import numpy as np
from etils import epath

from experiments.harness import devices

_FILE = "metrics.jsonl"


class MetricsLog:
    """A run's metrics over its steps, in `metrics.jsonl` and as TensorBoard events. Appends.

    A resumed run repeats the steps after its checkpoint, so what was written for them is taken back
    first: `metrics.jsonl` is cut to the lines up to `resume_step` (a line that a kill left half
    written goes too), and TensorBoard is told to drop the later events.

    A context manager.

    Args:
      workdir: the work directory, local or a bucket; created if missing.
      resume_step: step of the checkpoint that the run goes on from; None starts the log anew.
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int | None = None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        directory = epath.Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / _FILE
        self._events = None
        if not devices.is_first():
            return
        _cut(self._path, resume_step)
        first_step = 0 if resume_step is None else resume_step + 1
        # Written by this thread: what a full disk does to tensorboardX's own is to hang the run.
        self._events = EventsWriter(
            str(directory / "events"),
            # Its file names count in seconds: a run resumed at once must not write over the last.
            filename_suffix=f".{os.getpid()}.{first_step}",
        )
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write_event(first_step, session_log=start)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, **values: Any) -> None:
        """Writes one line, `step` first; it is on its way to the disk on return.

        Args:
          step: number of training steps behind these values.
          **values: by name: numbers, 0-d arrays, strings, or arrays and nested containers of them.
            TensorBoard gets the finite numbers, under the same names.
        """
        line = {"step": int(step)} | {name: _plain(value) for name, value in values.items()}
        _append(self._path, line)
        from tensorboardX import summary

        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self._write_event(line["step"], summary=summary.scalar(name, value))

    def image(self, tag: str, step: int, array: np.ndarray) -> None:
        """Shows a picture in TensorBoard, such as `pictures.grid` makes.

        Args:
          tag: its name there.
          step: number of training steps behind it.
          array: uint8 [h, w, c] with c = 1 or 3.
        """
        from tensorboardX import summary

        picture = summary.image(tag, np.asarray(array), dataformats="HWC")
        self._write_event(int(step), summary=picture)

    def close(self) -> None:
        """Closes TensorBoard's file; `metrics.jsonl` is closed after each line."""
        if self._events is not None:
            self._events.close()

    def _write_event(self, step: int, **content: Any) -> None:
        if self._events is None:
            return
        from tensorboardX.proto import event_pb2

        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))
        self._events.flush()


def write_json(path: epath.PathLike, obj: Any) -> None:
    """Replaces a JSON file whole: at any instant it holds the old content or the new.

    Args:
      path: the file.
      obj: numbers, strings, booleans, None, arrays, and nested containers of them.

    Raises:
      TypeError: something in `obj` is none of these.
    """
    _replace(epath.Path(path), (_dumps(obj, indent=2) + "\n").encode())


def write_npz(path: epath.PathLike, **arrays: Any) -> None:
    """Replaces an .npz file whole, as `write_json` does."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    _replace(epath.Path(path), buffer.getvalue())


def append_jsonl(path: epath.PathLike, obj: Any) -> None:
    """Appends a line of JSON, on a line of its own even after one that a kill left half written.

    Args:
      path: the file; created if missing.
      obj: as for `write_json`.

    Raises:
      TypeError: as for `write_json`.
    """
    path = epath.Path(path)
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            _replace(path, content + b"\n")
    _append(path, obj)


def _cut(path: epath.Path, last_step: int | None) -> None:
    if not path.exists():
        return
    lines = path.read_bytes().splitlines()
    kept = [line + b"\n" for line in lines if _is_line_until(line, last_step)]
    _replace(path, b"".join(kept))


def _is_line_until(line: bytes, last_step: int | None) -> bool:
    try:
        return last_step is not None and json.loads(line)["step"] <= last_step
    except (ValueError, TypeError, KeyError):
        return False


def _append(path: epath.Path, obj: Any) -> None:
    line = _dumps(obj) + "\n"
    if not devices.is_first():
        return
    if "://" in os.fspath(path):  # a bucket, which has no appending
        _replace(path, ((path.read_text() if path.exists() else "") + line).encode())
        return
    # Opened for each line: closing is what commits it.
    with path.open("a") as file:
        file.write(line)


def _replace(path: epath.Path, content: bytes) -> None:
    if not devices.is_first():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _dumps(obj: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(obj), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    """`value` as what JSON has: arrays as lists, tuples as lists, NaN and infinities as None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
