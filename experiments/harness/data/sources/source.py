"""What every data set is: a split that has been found, with its shape and its grey levels."""

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
# A path on this disk or None for whatever a set takes by default.
Directory = str | None


class Source(NamedTuple):
    """A split that has been found and looked into, but not decoded.

    `num_levels` is the one place that says how many grey levels a set has: decoder, scaling and
    dequantisation are all made of it.

    Attributes:
      num_examples: images in the split.
      image_shape: (height, width, channels).
      num_levels: grey levels that a pixel can take.
      read: decodes the images [n, h, w, c] and the labels [n] or None.
      num_classes: that a label can name; 0 where the set has no labels.
      get: decodes one image [h, w, c] and its label or None, given its place; it can be pickled.
        None where a set comes as whole arrays.
      fingerprint: of which files there are, where they are the user's own; else 0.
    """

    num_examples: int
    image_shape: tuple[int, int, int]
    num_levels: int
    read: Callable[[], tuple[np.ndarray, np.ndarray | None]]
    num_classes: int = 0
    get: Callable[[int], tuple[np.ndarray, int | None]] | None = None
    fingerprint: int = 0

    @property
    def num_bytes(self) -> int:
        """Of the whole split, decoded."""
        return self.num_examples * int(np.prod(self.image_shape))


class Options(NamedTuple):
    """Settings of how a set's files are read; configs/base.py explains them.

    Attributes:
      image_size: side that images of a folder or of tensorflow-datasets are cropped and resized
        to, in pixels; 0: they stay as they are.
      channels: of a folder, 3 for colour or 1 for grey.
      held_out: share of the images that becomes validation, and again test, where they have no
        files of their own.
      split_seed: of that choice.
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
    """Every example of a set by its `get`, in order; decoded by as many threads as there are cores.

    A bar shows on a terminal for the sets that take a while.
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
    split: str, found: Mapping[str, Any], place: str, splits: Mapping[str, str] | ConfigDict
) -> tuple[Any, bool]:
    """Which of a set's files a split is in.

    Args:
      split: train, validation or test.
      found: files by split, of those that exist; empty where the set is not split yet.
      place: where was looked, for the message.
      splits: what each split is called there.

    Returns:
      The files, or None for those of the whole set, and whether the split is a seeded part of them
      (`part_of`). Validation is a part of train where it has no files.

    Raises:
      ConfigError: if the split is not there.
    """
    if not found:
        return None, True
    has_validation = "validation" in found
    if split in found and (split != "train" or has_validation):
        return found[split], False
    if split in ("train", "validation") and "train" in found:
        return found["train"], True
    names = ", ".join(splits[name] for name in found)
    raise ConfigError(
        f"config.data.splits.{split} = {splits[split]!r}: {place} has only {names}; add it, or set "
        f"config.data.splits.{split} to one of these"
    )


def part_of(
    num_examples: int, split: str, with_test: bool, options: Options, place: str
) -> Int[np.ndarray, "m"]:
    """The places, in rising order, of the examples that a seeded split gives to one part.

    Args:
      num_examples: in the whole.
      split: train, validation or test.
      with_test: whether test is cut out as well, or validation alone.
      options: `held_out` and `split_seed`.
      place: where the whole is, for the message.

    Raises:
      ConfigError: if a part would be empty.
    """
    if not 0 <= options.split_seed < 2**64:
        raise ConfigError(f"config.data.split_seed = {options.split_seed}; it must be in [0, 2⁶⁴)")
    if not 0 < options.held_out < 0.5:
        raise ConfigError(f"config.data.held_out = {options.held_out}; it must be between 0 and ½")
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
    """Of 0 … n − 1, from a counter-based generator with this key of two 64-bit words.

    It ranks the generator's raw words: numpy promises these for good, but not what its
    `permutation` makes of them (NEP 19), and a run may be resumed under another numpy.
    """
    words = np.random.Philox(key=np.array(key, np.uint64))
    return np.argsort(words.random_raw(n), kind="stable")
