"""A split of a data set before it is decoded, and the tools that all formats share."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt8
from ml_collections import ConfigDict
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
      image_shape: (height, width, channels).
      num_levels: number of grey levels that a pixel can have.
      read: decodes the images [n, h, w, c] and the labels [n] or None.
      num_classes: number of classes; 0 if the set has no labels.
      get: decodes the image [h, w, c] at a place, and its label or None; can be pickled. None if
        the set is stored as whole arrays.
      fingerprint: computes a text that changes with the names, sizes or content of the files
        (`content.fingerprint`); empty for an embedded set.
    """

    num_examples: int
    image_shape: tuple[int, int, int]
    num_levels: int
    read: Callable[[], tuple[np.ndarray, np.ndarray | None]]
    num_classes: int = 0
    get: Callable[[int], tuple[np.ndarray, int | None]] | None = None
    fingerprint: Callable[[], str] = str

    @property
    def num_bytes(self) -> int:
        """Size of the decoded split."""
        return self.num_examples * int(np.prod(self.image_shape))


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
) -> tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, "n"] | None]:
    """All examples of a set in order, decoded by one thread per core.

    A progress bar appears on a terminal after two seconds.
    """
    images = np.empty((num_examples, *shape), np.uint8)
    labels = np.empty(num_examples, np.int32) if labelled else None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        examples = pool.map(get, range(num_examples))
        bar = tqdm(examples, description, num_examples, leave=False, delay=2, disable=None)
        for index, (image, label) in enumerate(bar):
            images[index] = image
            if labelled:
                labels[index] = label
    return images, labels


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
