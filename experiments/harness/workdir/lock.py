"""One training run in a work directory at a time."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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


@contextmanager
def held(workdir: epath.PathLike) -> Iterator[None]:
    """Locks a work directory for this run; the end of the process, of any kind, unlocks it.

    Where locks do not exist, as in a bucket, it prints a warning and continues.

    Raises:
      ConfigError: if another run holds the directory, or it can't be written.
    """
    path = epath.Path(workdir) / _FILE
    file, is_refused = None, False
    if distributed.is_first() and "://" in os.fspath(path):
        _warn(workdir, "a bucket")
    elif distributed.is_first():  # it holds the lock for all processes of the run
        try:
            file = _lock(os.fspath(path))
        except BlockingIOError:
            is_refused = True
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise ConfigError(
                    f"workdir={workdir}: {_FILE} cannot be written ({error.strerror})"
                ) from error
            _warn(workdir, f"a file system without locks: {error.strerror}")
    if distributed.in_any(is_refused):
        raise ConfigError(
            f"workdir={workdir} is being trained in by {_holder(path)}; wait until that ends, stop "
            "it, or use another workdir"
        )
    try:
        yield
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


def _holder(path: epath.Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _warn(workdir: epath.PathLike, what: str) -> None:
    tqdm.write(
        f"warning: workdir={workdir} is on {what}: no lock prevents a second run there, so start "
        "no other"
    )
