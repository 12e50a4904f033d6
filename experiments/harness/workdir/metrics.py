"""Metrics over the steps of a run: `metrics.jsonl` and TensorBoard events.

The JSON is strict: NaN and infinity become null. Of several processes the first one writes, and
the same call does nothing in the others.
"""

import json
import os
import time
from typing import Any

import numpy as np
from etils import epath

from experiments.harness.processes import distributed
from experiments.harness.workdir.files import append, plain, replace

_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends the metrics of a run to `metrics.jsonl` and to TensorBoard events.

    A resumed run repeats the steps after its checkpoint, so their metrics are removed first:
    `metrics.jsonl` keeps the complete lines up to `resume_step`, and TensorBoard drops later
    events.

    A context manager.

    Args:
      workdir: the work directory, local or a bucket; created if missing.
      resume_step: step of the checkpoint at which the run resumes; None starts a new log.
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int | None = None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        directory = epath.Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / _FILE
        self._events = None
        if not distributed.is_first():
            return
        _cut(self._path, resume_step)
        first_step = 0 if resume_step is None else resume_step + 1
        # Written by this thread: with a full disk tensorboardX's own thread hangs the run.
        self._events = EventsWriter(
            str(directory / "events"),
            # Its file names count in seconds: a run resumed at once must not overwrite a file.
            filename_suffix=f".{os.getpid()}.{first_step}",
        )
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write_event(first_step, session_log=start)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, **values: Any) -> None:
        """Writes one line, `step` first, and flushes it.

        Args:
          step: number of training steps done.
          **values: numbers, strings, arrays, or nested containers of them. TensorBoard gets the
            finite numbers.
        """
        line = {"step": int(step)} | {name: plain(value) for name, value in values.items()}
        append(self._path, line)
        from tensorboardX import summary

        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self._write_event(line["step"], summary=summary.scalar(name, value))

    def image(self, tag: str, step: int, array: np.ndarray) -> None:
        """Shows a picture in TensorBoard.

        Args:
          tag: its name there.
          step: number of training steps done.
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


def _cut(path: epath.Path, last_step: int | None) -> None:
    if not path.exists():
        return
    lines = path.read_bytes().splitlines()
    replace(path, b"".join(line + b"\n" for line in lines if _is_line_until(line, last_step)))


def _is_line_until(line: bytes, last_step: int | None) -> bool:
    try:
        return last_step is not None and json.loads(line)["step"] <= last_step
    except (ValueError, TypeError, KeyError):
        return False
