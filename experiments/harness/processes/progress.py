"""Progress bars with speed and remaining time; in a log file a line every 20 seconds."""

import sys
import time
import warnings
from typing import Any

from tqdm import std

with warnings.catch_warnings():
    # In a notebook without ipywidgets: the lines of a log file serve there.
    warnings.simplefilter("ignore", std.TqdmWarning)
    from tqdm import auto

from experiments.harness.processes import distributed

_SECONDS_PER_LINE = 20.0


def progress(total: int | None, description: str, unit: str, **settings: Any) -> std.tqdm:
    """A bar over `total` units (None: unknown); further settings are tqdm's.

    In a notebook it is a widget. Where standard error is no terminal it prints whole lines.
    """
    is_notebook = any(base.__module__ == "tqdm.notebook" for base in auto.tqdm.__mro__)
    is_drawn = is_notebook or sys.stderr.isatty()
    if not is_drawn:
        settings["ncols"] = 0  # numbers without a bar
    return (auto.tqdm if is_drawn else _Lines)(
        total=total,
        desc=description,
        unit=unit,
        mininterval=0.5 if is_drawn else _SECONDS_PER_LINE,
        maxinterval=60,
        disable=not distributed.is_first(),
        **settings,
    )


def start_after(bar: std.tqdm, units: int) -> None:
    """Counts units whose time is no part of the speed, since a program was compiled in it."""
    bar.n += units
    bar.initial = bar.last_print_n = bar.n
    bar.start_t = bar.last_print_t = time.time()
    bar.refresh()


class _Lines(std.tqdm):
    """Prints a line at intervals, and one at the end of a bar that is left to be seen."""

    _next_line = float("inf")

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self._next_line = time.monotonic() + _SECONDS_PER_LINE

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Prints a line if it is time for one; tqdm calls this at each change and message."""
        del pos
        if msg != "" and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_PER_LINE
            self.fp.write(f"{self if msg is None else msg}\n")

    def clear(self, nolock: bool = False) -> None:
        """Does nothing: what is printed stays."""

    def close(self) -> None:
        """Prints the last line."""
        if not self.disable and self.leave:
            self._next_line = 0.0
            self.display()
        self.leave = False
        super().close()
