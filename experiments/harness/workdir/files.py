"""The small files of a work directory: written whole or not at all, and never trusted unread."""

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from etils import epath
from tqdm import tqdm

from experiments.harness.errors import ConfigError, in_short
from experiments.harness.processes import distributed

Content = TypeVar("Content")

# What reading or using a damaged file raises.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


def read(
    path: epath.PathLike, parse: Callable[[Any], Content], remedy: str | None = None
) -> Content | None:
    """The content of a .json or .npz file; None if there is no such file.

    Args:
      path: the file.
      parse: takes the JSON object, or the arrays by name, and returns what the caller uses of it.
        Any error of a missing entry or of a wrong type, shape or value means that the file is
        damaged.
      remedy: what can be done about a damaged file. None: the file can be made anew, so its damage
        is printed as a warning, and the result is None as if it did not exist.

    Raises:
      ConfigError: it is damaged and has a remedy, or it cannot be read, such as a directory.
    """
    path = epath.Path(path)
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    try:
        if path.suffix == ".npz":
            with np.load(io.BytesIO(content)) as saved:
                return parse(dict(saved))
        loaded = json.loads(content)
        if not isinstance(loaded, dict):
            raise TypeError(f"it holds no JSON object but {str(loaded)[:20]!r}")
        return parse(loaded)
    except _DAMAGE as error:
        damage = f"{path} is damaged ({in_short(error)})"
        if remedy is not None:
            raise ConfigError(f"{damage}; {remedy}") from error
    tqdm.write(f"warning: {damage}; going on without it")
    return None


def require_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A finite array of numbers; raises ValueError for another shape, type or value."""
    if array.shape != shape or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise ValueError(f"{name} is no finite array of shape {shape}")
    return array


def write_json(path: epath.PathLike, obj: Any) -> None:
    """Replaces a JSON file; at any instant it holds the old content or the new.

    Args:
      path: the file.
      obj: numbers, strings, booleans, None, arrays, and nested containers of them.

    Raises:
      TypeError: `obj` contains another type.
    """
    replace(epath.Path(path), (_dumps(obj, indent=2) + "\n").encode())


def write_npz(path: epath.PathLike, **arrays: Any) -> None:
    """Replaces an .npz file, as `write_json` does."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    replace(epath.Path(path), buffer.getvalue())


def append_jsonl(path: epath.PathLike, obj: Any) -> None:
    """Appends a line of JSON; an incomplete last line, left by a kill, stays a line of its own.

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
            replace(path, content + b"\n")
    append(path, obj)


def append(path: epath.Path, obj: Any) -> None:
    line = _dumps(obj) + "\n"
    if not distributed.is_first():
        return
    if "://" in os.fspath(path):  # a bucket, which cannot append
        replace(path, ((path.read_text() if path.exists() else "") + line).encode())
        return
    # Opened for each line: closing commits it.
    with path.open("a") as file:
        file.write(line)


def replace(path: epath.Path, content: bytes) -> None:
    """Replaces a file: a kill or a power cut leaves the old content or the new."""
    if not distributed.is_first():
        return
    is_bucket = "://" in os.fspath(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if not is_bucket:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if not is_bucket:
            _sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_directory(directory: epath.Path) -> None:
    """Has the disk store which files a directory names. Windows opens no directories."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dumps(obj: Any, indent: int | None = None) -> str:
    return json.dumps(plain(obj), indent=indent, allow_nan=False)


def plain(value: Any) -> Any:
    """`value` in JSON's types: arrays and tuples as lists, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
