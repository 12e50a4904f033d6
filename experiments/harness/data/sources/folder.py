"""A folder of image files of any size: `data.name` = folder, `data.data_dir` its path."""

import functools
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.harness.data.sources.content import fingerprint
from experiments.harness.data.sources.images import (
    CORRUPT,
    NOT_READ,
    SUFFIXES,
    UnusableImage,
    decode,
    pixels,
)
from experiments.harness.data.sources.source import (
    Directory,
    Options,
    Source,
    choose_split,
    part_of,
    read_each,
)
from experiments.harness.data.sources.split_names import (
    check_no_sibling_split,
    check_not_pooled,
    split_paths,
)
from experiments.harness.errors import ConfigError


class Images:
    """Image files with a label each, or None.

    Attributes:
      root: the folder.
      names: names of the files, relative to root.
      labels: class index of each image; None if there are no classes.
      size, channels: side and channels of the decoded images.
    """

    def __init__(
        self,
        root: Path,
        names: tuple[str, ...],
        labels: tuple[int, ...] | None,
        size: int,
        channels: int,
    ):
        self.root, self.names, self.labels = root, names, labels
        self.size, self.channels = size, channels

    def __call__(self, index: int) -> tuple[UInt8[np.ndarray, "h w c"], int | None]:
        """An image and its label.

        Raises:
          ConfigError: naming the file, if it cannot be used.
        """
        path = self.root / self.names[index]
        label = None if self.labels is None else self.labels[index]
        try:
            return decode(path, self.size, self.channels), label
        except UnusableImage as error:
            remedy = "convert it to opaque 8-bit pixels of a moderate size, or remove it"
            raise ConfigError(f"{path}: {error}; {remedy}") from error
        except CORRUPT as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{path} cannot be read ({reason}); replace or remove it, or leave out all such "
                "images by config.data.skip_corrupt=True"
            ) from error

    def can_be_read(self, index: int) -> bool:
        """Whether an image is undamaged.

        Raises:
          ConfigError: if it is whole, but cannot be used.
        """
        try:
            self(index)
        except ConfigError as error:
            if isinstance(error.__cause__, UnusableImage):
                raise
            return False
        return True


def folder(
    data_dir: Directory, split: str, splits: Mapping[str, str] | ConfigDict, options: Options
) -> Source:
    """A split of a folder: its subfolder of that name, or a seeded part of the whole folder.

    Validation is a seeded part of train if it alone is missing. Folders inside are classes if
    every split has the same ones and no image lies outside of them. A process lists the files
    once.

    Args:
      data_dir: the folder.
      split: train, validation or test.
      splits: the name of each split's subfolder.
      options: size, channels, seeded split, and whether to skip damaged files.

    Raises:
      ConfigError: if there is no such folder or split, or no image in it.
    """
    root = _existing(data_dir)
    existing = split_paths(root, "", splits)
    inside = [path for path in root.iterdir() if path.name[0] != "."]
    if not existing and len(inside) == 1 and inside[0].is_dir():  # perhaps one folder deeper
        existing = split_paths(inside[0], "", splits)
    part, is_seeded = choose_split(split, existing, str(root), splits)
    where = root if part is None else part
    names = _image_files(where)
    if not names:
        raise ConfigError(
            f"config.data.data_dir = {str(root)!r}: no image in {where}; it must hold files that "
            f"end in {', '.join(SUFFIXES)}"
        )
    if part is None:
        check_no_sibling_split(root, "")
        check_not_pooled(root, names)
    classes, unlabelled = _classes([where] if part is None else list(existing.values()))
    if is_seeded:
        places = part_of(len(names), split, part is None, options, str(where))
        names = tuple(names[i] for i in places)
    if options.skip_corrupt:
        names = _undamaged(where, names, options)
    number = {name: i for i, name in enumerate(classes)}
    labels = tuple(number[_class_of(name)] for name in names) if classes else None
    get = Images(where, names, labels, options.image_size, options.channels)
    shape = (options.image_size, options.image_size, options.channels)
    description = f"{root.name} {split}"
    read = functools.partial(read_each, get, len(names), shape, description, labels is not None)
    content = functools.partial(fingerprint, where, names)
    get(0)  # raises before training
    return Source(len(names), shape, 256, read, len(classes), get, content, unlabelled)


def pictures(
    directory: str, shape: tuple[int, int, int], limit: int
) -> UInt8[np.ndarray, "n h w c"]:
    """The images of a folder in the order of their names, neither cropped nor resized.

    Args:
      directory: the folder.
      shape: of each image.
      limit: how many, the first ones; 0: all.

    Raises:
      ConfigError: if there is none, or one is damaged, of another shape, or in colour for one
        channel.
    """
    root = Path(directory)
    names = _image_files(root)[: limit or None] if root.is_dir() else ()
    if not names:
        raise ConfigError(f"{directory!r} is no folder that holds images")
    images = np.zeros((len(names), *shape), np.uint8)
    for image, name in zip(images, names, strict=True):
        try:
            colours = pixels(root / name, 3)
        except CORRUPT as error:  # an UnusableImage is a ValueError
            reason = " ".join(str(error).split())
            raise ConfigError(f"{root / name} cannot be used ({reason})") from error
        is_grey = np.ptp(colours, axis=-1).max() == 0
        if colours.shape[:2] != shape[:2] or (shape[2] == 1 and not is_grey):
            kind = "grey" if is_grey else "coloured"
            raise ConfigError(
                f"{root / name} is a {kind} image of {colours.shape[:2]} pixels; "
                f"the others and the model have the shape {shape}"
            )
        image[:] = colours[..., : shape[2]]
    return images


def _existing(data_dir: Directory) -> Path:
    """The folder that data_dir names."""
    if data_dir and Path(data_dir).is_dir():
        return Path(data_dir)
    raise ConfigError(
        f"config.data.data_dir = {data_dir!r} is no folder; with config.data.name = 'folder' give "
        "one of images, or of the subfolders train, validation and test"
    )


@functools.lru_cache(maxsize=8)
def _image_files(root: Path) -> tuple[str, ...]:
    """Sorted names, relative to a folder, of all its images; hidden files are left out.

    Follows links, except for those to a folder that contains the link.

    Raises:
      ConfigError: if a folder cannot be listed.
    """
    names, others = [], Counter()
    for parent, folders, files in os.walk(root, onerror=_cannot_be_listed, followlinks=True):
        real = Path(parent).resolve()
        around = (real, *real.parents)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (real / name).resolve() not in around
        ]
        inside = Path(parent).relative_to(root)
        names += [
            (inside / name).as_posix()
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
        others.update(Path(name).suffix.lower() for name in files)
    if left_out := [f"{others[suffix]:,} {suffix}" for suffix in NOT_READ if others[suffix]]:
        tqdm.write(f"{str(root)!r}: left out {', '.join(left_out)}; convert them to be read")
    return tuple(sorted(names))


def _cannot_be_listed(error: OSError) -> None:
    raise ConfigError(f"{error.filename} cannot be listed ({error.strerror})") from error


def _class_of(name: str) -> str:
    """The first folder of a file's name; empty if it has none."""
    return name.partition("/")[0] if "/" in name else ""


def _classes(folders: list[Path]) -> tuple[tuple[str, ...], str]:
    """The classes of all folders.

    There are none if the folders differ, or have images outside of classes; then the second result
    names such a class or image.
    """
    each = {path: {_class_of(name) for name in _image_files(path)} for path in folders}
    every = set().union(*each.values())
    for path, classes in each.items():
        if "" in classes:
            name = next(name for name in _image_files(path) if not _class_of(name))
            return (), f"{path / name} is in no folder of a class"
        if every - classes - {""}:
            return (), f"{path} has no class {sorted(every - classes - {''})[0]}"
    return tuple(sorted(every)), ""


@functools.lru_cache(maxsize=8)
def _undamaged(root: Path, names: tuple[str, ...], options: Options) -> tuple[str, ...]:
    """The readable files; decodes every file and prints the number of damaged ones."""
    images = Images(root, names, None, options.image_size, options.channels)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = pool.map(images.can_be_read, range(len(names)))
        bar = tqdm(checked, f"check {root.name}", len(names), leave=False, delay=2, disable=None)
        good = list(bar)
    bad = [name for name, is_good in zip(names, good, strict=True) if not is_good]
    if len(bad) == len(names):
        raise ConfigError(f"{root}: none of its {len(names)} images can be read")
    if bad:
        tqdm.write(
            f"skipped {len(bad):,} of {len(names):,} images in {root} that cannot be read, the "
            f"first {bad[0]!r}"
        )
    return tuple(name for name, is_good in zip(names, good, strict=True) if is_good)
