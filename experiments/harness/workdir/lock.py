"""Locks of files, which end with the process: one training run in a work directory at a time."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from etils import epath
from tqdm import tqdm

from experiments.harness.errors import ConfigError
from experiments.harness.processes import distributed

try:
    import fcntl
except ImportError:  # it exists on Unix alone
    fcntl = None

_FILE = "training.lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class NoLocksError(Exception):
    """The place has no locks; the message says what it is."""


@contextmanager
def held(workdir: epath.PathLike) -> Iterator[None]:
    """Locks a work directory for this run; the end of the process, of any kind, unlocks it.

    Where locks do not exist, as in a bucket, it prints a warning and continues.

    Raises:
      ConfigError: if another run holds the directory, or it can't be written.
    """
    path = epath.Path(workdir) / _FILE
    with ExitStack() as stack:
        is_refused = False
        if distributed.is_first():  # it holds the lock for all processes of the run
            try:
                is_refused = not stack.enter_context(attempted(path))
            except NoLocksError as error:
                _warn(workdir, str(error))
        if distributed.in_any(is_refused):
            raise ConfigError(
                f"workdir={workdir} is being trained in by {holder(path)}; wait until that ends, "
                "stop it, or use another workdir"
            )
        yield


@contextmanager
def attempted(path: epath.PathLike) -> Iterator[bool]:
    """Tries to lock a file in the body; yields False if another process holds it.

    The end of the process, of any kind, unlocks it.

    Raises:
      NoLocksError: if there are no locks in this place, such as in a bucket.
      ConfigError: if the file can't be written.
    """
    path, file = epath.Path(path), None
    if "://" in os.fspath(path):
        raise NoLocksError("a bucket")
    try:
        file = _lock(os.fspath(path))
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno in _NO_LOCKS:
            path.unlink(missing_ok=True)
            raise NoLocksError(f"a file system without locks: {error.strerror}") from error
        raise ConfigError(
            f"workdir={path.parent}: {path.name} cannot be written ({error.strerror})"
        ) from error
    try:
        yield file is not None
    finally:
        if file is not None:
            # Removed before it is unlocked: see `_lock`.
            with suppress(OSError):
                path.unlink(missing_ok=True)
            os.close(file)


def _lock(path: str) -> int:
    """A descriptor of the locked file, which names this process."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "this system has no fcntl")
    holder = {"pid": os.getpid(), "host": socket.gethostname()}
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file between the two calls.
            with suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(file).st_ino:
                    os.ftruncate(file, 0)
                    os.write(file, json.dumps(holder).encode())
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def holder(path: epath.PathLike) -> str:
    """The process that holds a lock, for people."""
    try:
        holder = json.loads(epath.Path(path).read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _warn(workdir: epath.PathLike, what: str) -> None:
    tqdm.write(
        f"warning: workdir={workdir} is on {what}: no lock prevents a second run there, so start "
        "no other"
    )
