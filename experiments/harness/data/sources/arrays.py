"""Images as arrays in .npz files: `data.name` = npz, `data.data_dir` a file or a folder of them."""

import functools
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32, UInt8
from ml_collections import ConfigDict

from experiments.harness.data.sources.source import (
    Directory,
    Options,
    Source,
    check_labels,
    check_unpacked,
    choose_split,
    num_classes_of,
    part_of,
)
from experiments.harness.data.sources.split_names import check_no_sibling_split, split_paths
from experiments.harness.errors import ConfigError

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def npz(
    data_dir: Directory, split: str, splits: Mapping[str, str] | ConfigDict, options: Options
) -> Source:
    """A split of arrays `images`, uint8 [n, h, w, c] or [n, h, w], and perhaps `labels` [n].

    A folder holds train.npz, validation.npz and test.npz, where validation is a seeded part of
    train if it alone is missing; a single file is split by seed. Grey levels are 0 … 255, and the
    labels of train determine the number of classes.

    Args:
      data_dir: the file, or the folder.
      split: train, validation or test.
      splits: the name of each split's file, without .npz.
      options: those of a seeded split.

    Raises:
      ConfigError: if a file is missing, damaged or without arrays of that kind.
    """
    root = Path(data_dir or "")
    if root.is_file():
        existing, whole = {}, root
        check_no_sibling_split(root, ".npz")
    else:
        existing = split_paths(root, ".npz", splits) if data_dir and root.is_dir() else {}
        if not data_dir or not existing:
            raise ConfigError(
                f"config.data.data_dir = {data_dir!r}; with config.data.name = 'npz' give a file "
                "with arrays images and labels, or a folder of train.npz, validation.npz, test.npz"
            )
        whole = None
    part, is_seeded = choose_split(split, existing, str(root), splits)
    path = whole or part
    with _explained(path):
        shape, has_labels = _headers(path)
        train = existing.get("train", path)
        num_classes, unlabelled = 0, ""
        if has_labels and _headers(train)[1]:
            num_classes, labels = num_classes_of(_labels(train), str(train)), _labels(path)
            check_labels(labels, num_classes, str(path))
            if labels.min() < 0:
                num_classes = 0
                unlabelled = f"the one at {labels.argmin()} has {labels.min()}"
    rows = np.arange(shape[0])
    if is_seeded:
        rows = part_of(shape[0], split, whole is not None, options, str(path))
    read = functools.partial(_read, path, rows if is_seeded else None)
    content = functools.partial(_fingerprint, path)
    return Source(
        len(rows),
        (*shape[1:], 1)[:3],
        256,
        read,
        num_classes,
        fingerprint=content,
        unlabelled=unlabelled,
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns the errors of numpy and zipfile at a damaged file into a ConfigError that names it."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path} cannot be read ({reason}); write it again by "
            "numpy.savez(path, images=images, labels=labels)"
        ) from error


def _headers(path: Path) -> tuple[tuple[int, ...], bool]:
    """The shape of the images, and whether there are labels; reads no pixels."""
    with zipfile.ZipFile(path) as archive:
        shape, dtype = _header(archive, "images.npy", path)
        has_labels = "labels.npy" in archive.namelist()
        if has_labels:
            _header(archive, "labels.npy", path)
    if dtype != np.uint8 or len(shape) not in (3, 4) or 0 in shape:
        raise ConfigError(
            f"{path}: images are of type {dtype} and shape {shape}; they must be uint8 of shape "
            "(number, height, width[, channels])"
        )
    if len(shape) == 4 and shape[3] not in (1, 3):
        remedy = "must be 1 or 3"
        if shape[1] in (1, 3):
            remedy += "; these seem to come first: write images.transpose(0, 2, 3, 1)"
        elif shape[2] in (1, 3):
            remedy += "; the images seem to come last: write images.transpose(3, 0, 1, 2)"
        elif shape[3] in (2, 4):
            remedy += f"; the last may be alpha: write images[..., :{shape[3] - 1}]"
        raise ConfigError(
            f"{path}: images of shape {shape} have {shape[3]} channels, which {remedy}"
        )
    return shape, has_labels


def _header(archive: zipfile.ZipFile, name: str, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array of the archive, whose size must agree with them."""
    with archive.open(name) as file:
        shape, _, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
        expected = file.tell() + math.prod(shape) * dtype.itemsize
    info = archive.getinfo(name)
    if info.file_size != expected and not dtype.hasobject:
        raise ValueError(f"{name} has {info.file_size:,} bytes where its header says {expected:,}")
    check_unpacked(path, info.compress_size, info.file_size)
    return shape, dtype


def _fingerprint(path: Path) -> str:
    """Of both arrays, whole, from the sizes and checksums that the archive lists."""
    with _explained(path), zipfile.ZipFile(path) as archive:
        members = [archive.getinfo(name) for name in _members(archive)]
    return " ".join(f"{member.file_size}:{member.CRC:08x}" for member in members)


def _members(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in ("images.npy", "labels.npy") if name in archive.namelist()]


def _labels(path: Path) -> Int32[np.ndarray, "n"]:
    with np.load(path, allow_pickle=False) as arrays:
        labels, num_images = arrays["labels"], _headers(path)[0][0]
    if labels.shape != (num_images,) or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(
            f"{path}: labels are of type {labels.dtype} and shape {labels.shape}; they must be "
            f"integers of shape ({num_images},)"
        )
    if labels.size and (labels.max() >= 2**31 or labels.min() < -(2**31)):
        raise ConfigError(f"{path}: the label {labels.max()} does not fit into 32 bits")
    return labels.astype(np.int32)


def _read(
    path: Path, rows: Int[np.ndarray, "m"] | None
) -> tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, "n"] | None]:
    """A file's arrays, or some rows of them."""
    with _explained(path):
        shape, has_labels = _headers(path)
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"].reshape(*shape[:3], -1)
        labels = _labels(path) if has_labels else None
    if rows is None:
        return images, labels
    return images[rows], None if labels is None else labels[rows]
