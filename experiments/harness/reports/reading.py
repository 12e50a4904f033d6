"""Reads the files of a directory that may be half-written, damaged or of another version."""

import base64
import io
import json
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath

from experiments.harness.errors import ConfigError, in_short, one_line
from experiments.harness.workdir.files import read

Content = TypeVar("Content")
_LARGEST = 200_000  # bytes of a picture; a larger one is compressed with losses
_WIDEST = 1200  # pixels of such a picture


class Picture(NamedTuple):
    """An image to show in a page.

    Attributes:
      source: a data URI.
      width: in pixels of the image.
      height: in pixels of the image.
      is_reduced: whether it is smaller or less exact than the file.
    """

    source: str
    width: int
    height: int
    is_reduced: bool


class Reader:
    """Reads files of a directory; what cannot be read is left out and noted.

    Args:
      directory: the directory.

    Attributes:
      directory: the same.
      problems: a line for each file that is damaged or cannot be read.
    """

    def __init__(self, directory: epath.Path):
        self.directory, self.problems = directory, []

    def parsed(self, name: str, parse: Callable[[Any], Content]) -> Content | None:
        """The content of a .json or .npz file, as `files.read` gives it; None if there is none."""
        try:
            return read(self.directory / name, parse, remedy="it is left out")
        except ConfigError as error:
            self.problems.append(str(error))
        except OSError as error:
            self._note(name, error)
        return None

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects in a file of JSON lines. An incomplete last line is being written."""
        content = self.bytes(name)
        objects, damaged = [], []
        *complete, rest = (content or b"").split(b"\n")
        for number, line in enumerate(complete, 1):
            value = _object(line)
            if value is not None:
                objects.append(value)
            elif line.strip():
                damaged.append(number)
        if (last := _object(rest)) is not None:
            objects.append(last)
        if damaged:
            self.problems.append(
                f"{self.directory / name}: {len(damaged)} of {len(complete)} lines are damaged, "
                f"the first is line {damaged[0]}; they are left out"
            )
        return objects

    def text(self, name: str) -> str | None:
        """The text of a file; None if there is none."""
        content = self.bytes(name)
        return None if content is None else content.decode(errors="replace")

    def picture(self, name: str) -> Picture | None:
        """An image file; None if there is none."""
        content = self.bytes(name)
        if content is None:
            return None
        try:
            return _picture(content)
        except (ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError) as error:
            self._note(name, error)
        return None

    def names(self, pattern: str) -> list[str]:
        """The files and directories that match a pattern such as samples/*.png, sorted."""
        folder, _, ending = pattern.rpartition("/")
        try:
            return sorted(
                path.relative_to(self.directory).as_posix()
                for path in (self.directory / folder).glob(ending)
                if not path.name.startswith(".")
            )
        except OSError as error:
            self._note(folder, error)
        return []

    def bytes(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        path = self.directory / name
        try:
            return path.read_bytes() if path.exists() else None
        except OSError as error:
            self._note(name, error)
        return None

    def _note(self, name: str, error: Exception) -> None:
        path = self.directory / name
        self.problems.append(one_line(f"{path} cannot be read ({in_short(error)})"))


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (RecursionError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _picture(content: bytes) -> Picture:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            try:
                image.load()
            except Warning as warning:
                raise ValueError(str(warning)) from warning
            is_reduced = len(content) > _LARGEST
            if is_reduced:
                content = _compressed(image)
            kind = "webp" if is_reduced else "png"
            code = base64.b64encode(content).decode()
            return Picture(f"data:image/{kind};base64,{code}", *image.size, is_reduced)


def _compressed(image: Any) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((_WIDEST, 2 * _WIDEST))
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=75)
    return buffer.getvalue()


def number(value: Any) -> float | None:
    """A finite number of a JSON file as a float; None for any other value."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number and math.isfinite(value) else None
    except OverflowError:
        return None


def required(values: Mapping[str, Any], name: str) -> float:
    """A number of a JSON object; raises ValueError or LookupError for any other value."""
    if (value := number(values[name])) is None:
        raise ValueError(f"{name} is no finite number")
    return value


def vector(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A finite vector of an .npz file; raises ValueError or LookupError for any other array."""
    array = np.asarray(arrays[name])
    if array.ndim != 1 or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise ValueError(f"{name} is no vector of finite numbers")
    return array.astype(np.float64)
