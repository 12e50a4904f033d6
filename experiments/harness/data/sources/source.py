"""A split of a data set before it is decoded, and the tools that all formats share."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Integer, Shaped
from ml_collections import ConfigDict
from numpy.typing import ArrayLike, DTypeLike
from tqdm import tqdm

from experiments.harness.errors import ConfigError

SPLITS = {"train": "train", "validation": "validation", "test": "test"}
# A path on this disk, or None for the default of a set.
Directory = str | None


class Source(NamedTuple):
    """A split that was found on disk, but not decoded.

    Decoder, scaling and dequantisation take the number of grey levels from here.

    Attributes:
      num_examples: images in the split.
      image_shape: (height, width, channels); of continuous data any shape, such as (2,).
      num_levels: number of grey levels that a pixel can have; 0 for continuous data, which are
        floats in data units, best of about unit variance.
      read: decodes the images [n, h, w, c] and the labels [n] or None.
      num_classes: number of classes; 0 if the set has no labels.
      get: decodes the image [h, w, c] at a place, and its label or None; can be pickled. None if
        the set is stored as whole arrays.
      fingerprint: computes a text that changes with the names, sizes or content of the files
        (`content.fingerprint`); empty for an embedded set.
      unlabelled: why the set has no labels, if there is more to say.
    """

    num_examples: int
    image_shape: tuple[int, ...]
    num_levels: int
    read: Callable[[], tuple[np.ndarray, np.ndarray | None]]
    num_classes: int = 0
    get: Callable[[int], tuple[np.ndarray, int | None]] | None = None
    fingerprint: Callable[[], str] = str
    unlabelled: str = ""

    @property
    def num_bytes(self) -> int:
        """Size of the decoded split."""
        return self.num_examples * int(np.prod(self.image_shape)) * self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype:
        """The type of decoded images."""
        return np.dtype(np.uint8 if self.num_levels else np.float32)

    @classmethod
    def of_array(cls, images: ArrayLike, labels: ArrayLike | None = None) -> "Source":
        """A split in memory: bytes as 256 grey levels, floats as continuous data.

        Args:
          images: uint8 [n, h, w, c], or floats [n, …] in data units.
          labels: integers [n]; None without.

        Raises:
          ConfigError: for another type or shape, no example, or a value that is not finite.
        """
        images = np.asarray(images)
        is_continuous = np.issubdtype(images.dtype, np.floating)
        fits = images.ndim > 1 if is_continuous else images.dtype == np.uint8 and images.ndim == 4
        if not images.size or not fits:
            raise ConfigError(
                f"a data set of {images.dtype} {images.shape}; it must be uint8 [n, h, w, c], or "
                "floats [n, …], of at least one example"
            )
        if not np.isfinite(images).all():
            raise ConfigError("a data set has values that are not finite; leave them out")
        if is_continuous:
            images = images.astype(np.float32)
        num_classes = 0
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
                raise ConfigError(
                    f"labels are {labels.dtype} {labels.shape}; they must be {len(images)} integers"
                )
            labels = labels.astype(np.int32)
            num_classes = num_classes_of(labels, "a data set")
        content = b"".join(a.tobytes() for a in (images, labels) if a is not None)
        digest = hashlib.sha256(content).hexdigest()[:12]
        return cls(
            len(images),
            images.shape[1:],
            0 if is_continuous else 256,
            lambda: (images, labels),
            num_classes,
            fingerprint=lambda: digest,
        )

    def summary(self) -> tuple[int, tuple[int, ...], str]:
        """What tells two training sets apart: number, shape and fingerprint of the images."""
        return self.num_examples, self.image_shape, self.fingerprint()


class Options(NamedTuple):
    """Settings for reading a set's files; configs/base.py explains them.

    Attributes:
      image_size: images of a folder or of tensorflow-datasets are cropped and resized to this
        side, in pixels; 0: they are not.
      channels: for a folder, 3 (colour) or 1 (grey).
      held_out: share of the images for validation, and again for test, if these have no files.
      split_seed: seed of that random split.
      skip_corrupt: whether images that cannot be read are left out.
    """

    image_size: int = 0
    channels: int = 3
    held_out: float = 0.1
    split_seed: int = 0
    skip_corrupt: bool = False

    @staticmethod
    def of(settings: ConfigDict) -> "Options":
        """From `config.data`."""
        return Options(*(settings[name] for name in Options._fields))


DEFAULTS = Options()


def read_each(
    get: Callable[[int], tuple[np.ndarray, int | None]],
    num_examples: int,
    shape: Sequence[int],
    description: str,
    labelled: bool,
    dtype: DTypeLike = np.uint8,
) -> tuple[Shaped[np.ndarray, "n *d"], Int32[np.ndarray, "n"] | None]:
    """All examples of a set in order, decoded by one thread per core.

    A progress bar appears on a terminal after two seconds.
    """
    images = np.empty((num_examples, *shape), dtype)
    labels = np.empty(num_examples, np.int32) if labelled else None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        examples = pool.map(get, range(num_examples))
        bar = tqdm(examples, description, num_examples, leave=False, delay=2, disable=None)
        for index, (image, label) in enumerate(bar):
            images[index] = image
            if labelled:
                labels[index] = label
    return images, labels


def num_classes_of(labels: Integer[np.ndarray, "n"], place: str) -> int:
    """The number of classes of a training set.

    Raises:
      ConfigError: if the labels do not start at 0, or there are more classes than examples.
    """
    lowest, highest = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    if lowest > 0:
        raise ConfigError(
            f"{place}: the labels start at {lowest}, and class 0 would have no example; write "
            f"labels - {lowest}, in all splits"
        )
    if highest >= max(len(labels), 1):
        raise ConfigError(
            f"{place}: the label {highest} of {len(labels)} examples; number the classes from 0 "
            "without gaps, by numpy.unique(labels, return_inverse=True)[1] over all splits"
        )
    return highest + 1


def check_labels(labels: Integer[np.ndarray, "n"], num_classes: int, place: str) -> None:
    """Raises ConfigError if a label does not occur in the training split."""
    if len(labels) and labels.max() >= num_classes:
        raise ConfigError(
            f"{place} has the label {labels.max()}; the labels of train end at {num_classes - 1}"
        )


def check_unpacked(path: Path, packed: int, unpacked: int) -> None:
    """Raises ConfigError if a compressed array is implausibly larger than its file.

    Args:
      path: the file.
      packed, unpacked: sizes of the array, in bytes.
    """
    size = path.stat().st_size
    if packed > size or unpacked > max(2**30, 100 * packed):
        raise ConfigError(
            f"{path} of {size:,} bytes would unpack to {unpacked:,}; that is no set of images, or "
            "store it without compression"
        )


def choose_split(
    split: str, existing: Mapping[str, Any], place: str, splits: Mapping[str, str] | ConfigDict
) -> tuple[Any, bool]:
    """The files that contain a split.

    Args:
      split: train, validation or test.
      existing: the existing files by split; empty if the set has no files by split.
      place: the directory, for the message.
      splits: the set's own name of each split.

    Returns:
      The files, or None for those of the whole set; and whether the split is a random part of them
      (`part_of`). Validation is a part of train if it has no files of its own.

    Raises:
      ConfigError: if the split is not there.
    """
    if not existing:
        return None, True
    has_validation = "validation" in existing
    if split in existing and (split != "train" or has_validation):
        return existing[split], False
    if split in ("train", "validation") and "train" in existing:
        return existing["train"], True
    names = ", ".join(splits[name] for name in existing)
    raise ConfigError(
        f"config.data.splits.{split} = {splits[split]!r}: {place} has only {names}; add it, or set "
        f"config.data.splits.{split} to one of these"
    )


def part_of(
    num_examples: int, split: str, with_test: bool, options: Options, place: str
) -> Int[np.ndarray, "m"]:
    """The places, in ascending order, of one part of a random split.

    Args:
      num_examples: size of the whole set.
      split: train, validation or test.
      with_test: whether test is a part too, or only validation.
      options: `held_out` and `split_seed`.
      place: the location of the whole set, for the message.

    Raises:
      ConfigError: if the part would be empty.
    """
    held = round(options.held_out * num_examples)
    if held < 1:
        raise ConfigError(
            f"config.data.held_out = {options.held_out} of the {num_examples} images in {place} "
            f"leaves {split} empty; use more images, or a larger share"
        )
    order = permutation((options.split_seed, 0), num_examples)
    bounds = {"validation": (0, held), "test": (held, 2 * held)}
    bounds["train"] = (2 * held if with_test else held, num_examples)
    return np.sort(order[slice(*bounds[split])])


def permutation(key: tuple[int, int], n: int) -> Int[np.ndarray, "n"]:
    """A permutation of 0 … n − 1, by a counter-based generator with a key of two 64-bit words.

    It ranks the generator's raw words: numpy guarantees these in all versions, but not the result
    of its `permutation` (NEP 19), and a run may be resumed with another numpy.
    """
    words = np.random.Philox(key=np.array(key, np.uint64))
    return np.argsort(words.random_raw(n), kind="stable")
