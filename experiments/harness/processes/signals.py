"""SIGTERM and SIGINT: a run saves what it has, other work just ends, both within seconds.

Signals are of the whole process, so what is known of them is too. A thread hears them beside the
main one, whose Python does not run while a program is being compiled.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_GRACE = 2.0  # seconds in which the main thread may end by itself, where it has nothing to save
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end.

    Attributes:
      status: the exit status that a shell gives to what a signal ended, 128 + its number.
      by_all: whether all processes that run together raise it.
    """

    def __init__(self, number: int, message: str | None = None, by_all: bool = False):
        self.number, self.status, self.by_all = number, 128 + number, by_all
        name = signal.Signals(number).name
        told = "the same command goes on from the last checkpoint" if message is None else message
        super().__init__(f"interrupted by {name}; {told}")


class _Heard:
    """What the process has been asked: the first signal's number, and how to answer it."""

    number: int | None = None
    answer: str = "leave"


@contextmanager
def listening() -> Iterator[None]:
    """Answers both signals while the body runs: `Interrupted` is raised in it, at the first.

    Where the main thread is in no position to raise, it ends the process itself soon after; a
    second signal does so at once. In `deferred` parts the first one is only noted. Does nothing
    outside of the main thread, as Python's handlers can't be there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Heard.number, _Heard.answer = None, "leave"
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
        _Heard.number = None


@contextmanager
def deferred() -> Iterator[None]:
    """In the body a signal is only noted, for `check` to raise where there is a state to save."""
    with _answering("note"):
        yield


@contextmanager
def raising() -> Iterator[None]:
    """Within `deferred`: a long computation that may be given up at any point."""
    with _answering("raise"):
        check()
        yield


def noted() -> int:
    """The number of the signal that has been noted; 0 if none has."""
    return _Heard.number or 0


def check() -> None:
    """Raises `Interrupted` if a signal has been noted."""
    if _Heard.number is not None:
        raise Interrupted(_Heard.number)


@contextmanager
def _answering(answer: str) -> Iterator[None]:
    before, _Heard.answer = _Heard.answer, answer
    try:
        yield
    finally:
        _Heard.answer = before


def _handle(number: int, frame: object) -> None:
    del frame
    if _Heard.number is not None:  # a second one, which the watcher answers
        return
    _Heard.number = number
    if _Heard.answer == "note":
        _say(f"{signal.Signals(number).name}: saving after this step; a second one leaves at once")
    else:
        raise Interrupted(number)


def _watch(reader: int) -> None:
    """Ends the process at a second signal, or if the first one has nothing to wait for."""
    first = _read(reader)
    if not first:
        return
    if _Heard.answer == "leave":
        second = _read(reader, _GRACE)
        if second is None:
            _say(f"error: {Interrupted(first)}")
            os._exit(128 + first)
    else:
        second = _read(reader)
    if second:
        _end(second)


def _read(reader: int, timeout: float | None = None) -> int | None:
    """The number of the next of our signals; 0 at the end, None if none came in time."""
    import select

    while select.select([reader], [], [], timeout)[0]:
        heard = os.read(reader, 1)
        if not heard or heard[0] in _SIGNALS:
            return heard[0] if heard else 0
    return None


def _end(number: int) -> None:
    _say(f"error: {Interrupted(number)}")
    os._exit(128 + number)


def _say(line: str) -> None:
    with suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"\n{line}\n".encode())
