"""SIGTERM and SIGINT: training saves its state and ends, other work only ends, within seconds.

Signals concern the whole process, so their state here is global. A second thread listens too: the
main thread runs no Python code while a program is being compiled.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_GRACE = 2.0  # seconds for the main thread to end by itself, if it has nothing to save
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end.

    Attributes:
      status: the exit status, 128 + the signal's number, as shells do.
      by_all: whether all processes of the run raise it.
    """

    def __init__(self, number: int, message: str | None = None, by_all: bool = False):
        self.number, self.status, self.by_all = number, 128 + number, by_all
        name = signal.Signals(number).name
        message = message or "the same command goes on from the last checkpoint"
        super().__init__(f"interrupted by {name}; {message}")


class _State:
    """The number of the first signal, if one came, and how to answer it."""

    number: int | None = None
    answer: str = "leave"  # or "note", or "raise"


@contextmanager
def listening() -> Iterator[None]:
    """Raises `Interrupted` in the body at the first signal.

    If the main thread cannot raise, the process ends soon after; at a second signal it ends at
    once. In `deferred` parts the first signal is only noted. Does nothing outside of the main
    thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.number, _State.answer = None, "leave"
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handlers = {number: signal.signal(number, _handle) for number in _SIGNALS}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)
        _State.number = None


@contextmanager
def deferred() -> Iterator[None]:
    """In the body a signal is only noted; `noted` and `check` report it."""
    with _answering("note"):
        yield


@contextmanager
def raising() -> Iterator[None]:
    """Within `deferred`: a signal raises again, since this computation may be abandoned."""
    with _answering("raise"):
        check()
        yield


def noted() -> int:
    """The number of the noted signal; 0 if there is none."""
    return _State.number or 0


def check() -> None:
    """Raises `Interrupted` if a signal has been noted."""
    if _State.number is not None:
        raise Interrupted(_State.number)


@contextmanager
def _answering(answer: str) -> Iterator[None]:
    before, _State.answer = _State.answer, answer
    try:
        yield
    finally:
        _State.answer = before


def _handle(number: int, frame: object) -> None:
    del frame
    if _State.number is not None:  # a second signal, which the watcher answers
        return
    _State.number = number
    if _State.answer == "note":
        _say(f"{signal.Signals(number).name}: saving after this step; a second one leaves at once")
    else:
        raise Interrupted(number)


def _watch(reader: int) -> None:
    """Ends the process at a second signal, or soon after the first if nothing is to be saved."""
    first = _read(reader)
    if not first:
        return
    second = _read(reader, _GRACE if _State.answer == "leave" else None)
    if second != 0:
        number = second or first
        _say(f"error: {Interrupted(number)}")
        os._exit(128 + number)


def _read(reader: int, timeout: float | None = None) -> int | None:
    """The number of the next signal; 0 at the end of the pipe, None after the timeout."""
    import select

    while select.select([reader], [], [], timeout)[0]:
        number = os.read(reader, 1)
        if not number or number[0] in _SIGNALS:
            return number[0] if number else 0
    return None


def _say(line: str) -> None:
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"\n{line}\n".encode())
