"""Atomic writing of files: a reader gets the old content or the new, never a part."""

import io
import json
import math
import os
from typing import Any

import numpy as np
from etils import epath

from experiments.harness.processes import distributed


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
    if not distributed.is_first():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
