"""Images as arrays in .npz files: `data.name` = npz, `data.data_dir` a file or a folder of them."""

import functools
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
    choose_split,
    part_of,
)
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
    else:
        files = {name: root / f"{splits[name]}.npz" for name in splits}
        existing = {name: path for name, path in files.items() if path.is_file()}
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
        num_classes = _num_classes(train) if has_labels and _headers(train)[1] else 0
    rows = np.arange(shape[0])
    if is_seeded:
        rows = part_of(shape[0], split, whole is not None, options, str(path))
    read = functools.partial(_read, path, rows if is_seeded else None)
    content = functools.partial(_fingerprint, path)
    return Source(len(rows), (*shape[1:], 1)[:3], 256, read, num_classes, fingerprint=content)


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
        with archive.open("images.npy") as file:
            shape, _, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
        has_labels = "labels.npy" in archive.namelist()
    if dtype != np.uint8 or len(shape) not in (3, 4) or 0 in shape:
        raise ConfigError(
            f"{path}: images are of type {dtype} and shape {shape}; they must be uint8 of shape "
            "(number, height, width[, channels])"
        )
    return shape, has_labels


def _fingerprint(path: Path) -> str:
    """Of both arrays, whole, from the sizes and checksums that the archive lists."""
    with _explained(path), zipfile.ZipFile(path) as archive:
        members = [archive.getinfo(name) for name in _members(archive)]
    return " ".join(f"{member.file_size}:{member.CRC:08x}" for member in members)


def _members(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in ("images.npy", "labels.npy") if name in archive.namelist()]


def _num_classes(path: Path) -> int:
    return int(_labels(path).max(initial=-1)) + 1


def _labels(path: Path) -> Int32[np.ndarray, "n"]:
    with np.load(path, allow_pickle=False) as arrays:
        labels, num_images = arrays["labels"], _headers(path)[0][0]
    if labels.shape != (num_images,) or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(
            f"{path}: labels are of type {labels.dtype} and shape {labels.shape}; they must be "
            f"integers of shape ({num_images},)"
        )
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
