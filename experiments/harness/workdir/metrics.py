"""Metrics over the steps of a run: `metrics.jsonl` and TensorBoard events.

The JSON is strict: NaN and infinity become null. Of several processes the first one writes, and
the same call does nothing in the others.
"""

import io
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from experiments.harness.processes import distributed
from experiments.harness.workdir.dependences import RUN, depends
from experiments.harness.workdir.files import append, plain, replace
from experiments.harness.workdir.provenance import flatten

METRICS_FILE = "metrics.jsonl"
_GOALS = ("validation_bits_per_dim", "test/bits_per_dim")  # what TensorBoard compares settings by


class Events:
    """A file of TensorBoard events in a work directory; a context manager.

    Args:
      workdir: the work directory, local or a bucket; created if missing.
    """

    def __init__(self, workdir: epath.PathLike):
        from tensorboardX.event_file_writer import EventsWriter

        directory = epath.Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        self._file = None
        if distributed.is_first():
            # Written by this thread: with a full disk tensorboardX's own thread hangs the run.
            # Its file names count in seconds: a later file must not overwrite this one.
            suffix = f".{os.getpid()}.{time.time_ns()}"
            self._file = EventsWriter(str(directory / "events"), filename_suffix=suffix)

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def start(self, step: int) -> None:
        """Makes TensorBoard drop the earlier events from this step on."""
        from tensorboardX.proto import event_pb2

        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step, session_log=start)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the finite numbers among some values by name."""
        from tensorboardX import summary

        for name, value in values.items():
            if isinstance(value, int | float) and np.isfinite(value):
                self._write(step, summary=summary.scalar(name, value))

    def pictures(self, step: int, files: Mapping[str, epath.PathLike]) -> None:
        """Shows image files by name."""
        if self._file is None:  # the others may not see the first process's files
            return
        from PIL import Image
        from tensorboardX.proto.summary_pb2 import Summary

        for name, path in files.items():
            content = epath.Path(path).read_bytes()
            with Image.open(io.BytesIO(content)) as opened:
                (width, height), channels = opened.size, len(opened.getbands())
            image = Summary.Image(
                height=height, width=width, colorspace=channels, encoded_image_string=content
            )
            self._write(step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def settings(self, config: ConfigDict) -> None:
        """Shows the settings that determine the training, to compare the results of several runs.

        They are under HPARAMS; the results there are the bounds on validation and on test.
        """
        from tensorboardX import summary

        settings = flatten(config.to_dict())
        shown = {name: settings[name] for name in sorted(depends(RUN, settings))}
        shown = {n: str(v) if isinstance(v, list) else v for n, v in shown.items()}
        for part in summary.hparams(shown, dict.fromkeys(_GOALS)):
            self._write(0, summary=part)

    def _write(self, step: int, **content: Any) -> None:
        if self._file is None:
            return
        from tensorboardX.proto import event_pb2

        self._file.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))
        self._file.flush()


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl; none if there is no such file."""
    path, lines = epath.Path(workdir) / METRICS_FILE, []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):  # incomplete, left by a kill
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def show(
    workdir: epath.PathLike,
    step: int,
    scalars: Mapping[str, Any] | None = None,
    pictures: Mapping[str, epath.PathLike] | None = None,
) -> None:
    """Shows the results of an experiment in TensorBoard, beside the training's.

    Args:
      workdir: the work directory.
      step: the training step of the weights.
      scalars: numbers by name.
      pictures: image files by name.
    """
    with Events(workdir) as events:
        events.scalars(step, scalars or {})
        events.pictures(step, pictures or {})


class MetricsLog:
    """Appends the metrics of a run to `metrics.jsonl` and to TensorBoard events.

    A resumed run repeats the steps after its checkpoint, so their metrics are removed first:
    `metrics.jsonl` keeps the complete lines up to `resume_step`, and TensorBoard drops later
    events.

    A context manager.

    Args:
      workdir: the work directory, local or a bucket; created if missing.
      resume_step: step of the checkpoint at which the run resumes; None starts a new log.

    Attributes:
      events: TensorBoard's file.
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int | None = None):
        self._path = epath.Path(workdir) / METRICS_FILE
        self.events = Events(workdir)
        if distributed.is_first():
            _cut(self._path, resume_step)
        self.events.start(0 if resume_step is None else resume_step + 1)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.events.close()

    def write(self, step: int, **values: Any) -> None:
        """Writes one line, `step` first, and flushes it.

        Args:
          step: number of training steps done.
          **values: numbers, strings, arrays, or nested containers of them. TensorBoard gets the
            finite numbers.
        """
        line = {name: plain(value) for name, value in values.items()}
        append(self._path, {"step": int(step)} | line)
        self.events.scalars(int(step), line)


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
