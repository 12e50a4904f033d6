"""MNIST's file format, gzipped or not: `data.name` = idx, `data.data_dir` the folder.

For Fashion-MNIST, `apt-get install dataset-fashion-mnist` on Debian and Ubuntu puts the files in
/usr/share/datasets/fashion-mnist.
"""

import functools
import gzip
import math
import os
import zlib
from collections.abc import Mapping
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8
from ml_collections import ConfigDict

from experiments.harness.data.sources.content import fingerprint
from experiments.harness.data.sources.source import (
    Directory,
    Options,
    Source,
    check_labels,
    check_unpacked,
    num_classes_of,
)
from experiments.harness.errors import ConfigError

_STEMS = {"train": "train", "validation": "train", "test": "t10k"}
_UNSIGNED_BYTE = 8


def idx(
    data_dir: Directory, split: str, splits: Mapping[str, str] | ConfigDict, options: Options
) -> Source:
    """A split of train-images-idx3-ubyte, train-labels-idx1-ubyte and the two t10k-… files.

    Each may end in .gz, and may be written train-images.idx3-ubyte. Validation is the last twelfth
    of the training images: 5,000 of MNIST's 60,000. The labels of train determine the number of
    classes.

    Args:
      data_dir: the folder.
      split: train, validation or test.
      splits, options: unused; all formats have these arguments.

    Raises:
      ConfigError: if a file is missing, damaged or not of unsigned bytes, or the split is unknown.
    """
    if split not in _STEMS:
        raise ConfigError(f"split = {split!r}: idx has only {', '.join(_STEMS)}")
    images, labels = (_find(data_dir, split, kind) for kind in ("images-idx3", "labels-idx1"))
    num_images, height, width = _shape(images, 3)
    [num_labels] = _shape(labels, 1)
    if num_labels != num_images:
        raise ConfigError(
            f"{labels} has {num_labels} labels, and {images} {num_images} images; take both from "
            "one copy of the set"
        )
    rows = slice(None)
    if split != "test":
        cut = num_images - num_images // 12
        rows = slice(cut) if split == "train" else slice(cut, None)
    num_examples = len(range(num_images)[rows])
    if not num_examples:
        raise ConfigError(f"{images} has only {num_images} images, too few for split {split!r}")
    train = _find(data_dir, "train", "labels-idx1")
    num_classes = num_classes_of(_array(train, 1), str(train))
    check_labels(_array(labels, 1), num_classes, str(labels))
    if not height * width:
        raise _damaged(images, f"its images are {height}×{width}")
    read = functools.partial(_read, images, labels, rows)
    content = functools.partial(fingerprint, Path(data_dir), (images.name, labels.name))
    return Source(num_examples, (height, width, 1), 256, read, num_classes, fingerprint=content)


def _find(data_dir: Directory, split: str, kind: str) -> Path:
    """The file of a split's images or labels."""
    root, name = Path(data_dir or ""), f"{_STEMS[split]}-{kind}-ubyte"
    names = [name, name.replace("-idx", ".idx")]
    for candidate in (*names, *(f"{name}.gz" for name in names)):
        if data_dir and (root / candidate).is_file():
            return root / candidate
    raise ConfigError(
        f"config.data.data_dir = {data_dir!r} has no {name}[.gz]; give the folder of MNIST's or "
        "Fashion-MNIST's files, or for the latter run apt-get install dataset-fashion-mnist and "
        "set config.data.data_dir=/usr/share/datasets/fashion-mnist"
    )


def _read(
    images: Path, labels: Path, rows: slice
) -> tuple[UInt8[np.ndarray, "n h w 1"], Int32[np.ndarray, "n"]]:
    return _array(images, 3)[rows, :, :, None], _array(labels, 1)[rows].astype(np.int32)


def _shape(path: Path, ndim: int) -> tuple[int, ...]:
    """The shape in a file's header."""
    try:
        with _open(path) as file:
            return _header(file, path, ndim)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error


def _array(path: Path, ndim: int) -> UInt8[np.ndarray, "..."]:
    """A file's array."""
    try:
        with _open(path) as file:
            shape = _header(file, path, ndim)
            content = file.read(math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    if len(content) != math.prod(shape):
        raise _damaged(path, f"{len(content)} bytes where its header says {math.prod(shape)}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _open(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _header(file: BufferedIOBase, path: Path, ndim: int) -> tuple[int, ...]:
    """Two zeros, the type, the number of dimensions, then each dimension in 32 bits, big-endian."""
    start = file.read(4 + 4 * ndim)
    if len(start) < 4 + 4 * ndim or tuple(start[:4]) != (0, 0, _UNSIGNED_BYTE, ndim):
        raise _damaged(path, f"its header is no IDX of {ndim} dimensions of unsigned bytes")
    shape = tuple(np.frombuffer(start[4:], ">u4").tolist())
    _check_size(path, len(start), math.prod(shape))
    return shape


def _check_size(path: Path, header: int, expected: int) -> None:
    """Raises ConfigError, before anything is read, if the content has not the expected size."""
    size = path.stat().st_size
    if path.suffix != ".gz":
        if size - header != expected:
            raise _damaged(path, f"{size - header} bytes where its header says {expected}")
        return
    check_unpacked(path, size, expected)
    with open(path, "rb") as file:  # a gzip file ends in the size of its content, modulo 2^32
        file.seek(-4, os.SEEK_END)
        unpacked = int.from_bytes(file.read(4), "little")
    if unpacked != (header + expected) % 2**32:
        raise _damaged(path, f"{unpacked} bytes where its header says {header + expected}")


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path} cannot be read ({reason}); download it again")
