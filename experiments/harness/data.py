"""Data sets in memory, and the order in which training and evaluation visit them.

A set is an array of grey levels. The order of training examples is a function of (seed, step), so
a run needs no iterator state to resume, and no batch depends on the machine or on the number of
devices.

To add an embedded set, write a function from a split's name to a `Source` and list it in
`DATASETS`. Any other name is an image set of tensorflow-datasets, which must have been prepared on
disk as ArrayRecord; it is read through `as_data_source`, without TensorFlow.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion.schedules import Array
from experiments.harness.errors import ConfigError

SPLITS = {"train": "train", "validation": "validation", "test": "test"}


class Examples(NamedTuple):
    """Some examples of a data set, which a compiled program takes as one argument.

    Attributes:
      images: grey levels.
      labels: class indices; None where the set has none, or the model is told none.
    """

    images: UInt8[Array, "b h w c"]
    labels: Int32[Array, "b"] | None


class Dataset(NamedTuple):
    """A split, whole and decoded.

    Attributes:
      images: grey levels 0..num_levels−1.
      labels: class indices, or None where the set has none.
      num_levels: grey levels that a pixel can take, whether or not one does.
      name: as in the config.
      split: as in the config, train, validation or test.
    """

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, "n"] | None
    num_levels: int
    name: str
    split: str

    def examples(self, index: Int[np.ndarray, "b"] | slice) -> Examples:
        """The examples at these places."""
        return Examples(self.images[index], None if self.labels is None else self.labels[index])


class Source(NamedTuple):
    """A split that has been found and looked into, but not decoded.

    Attributes:
      num_examples: images in the split.
      image_shape: (height, width, channels).
      num_levels: grey levels that a pixel can take.
      read: decodes the images [n, h, w, c] and the labels [n] or None.
      num_classes: that a label can name; 0 where the set has no labels.
    """

    num_examples: int
    image_shape: tuple[int, int, int]
    num_levels: int
    read: Callable[[], tuple[np.ndarray, np.ndarray | None]]
    num_classes: int = 0


def describe(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    splits: Mapping[str, str] | ConfigDict = SPLITS,
) -> Source:
    """Finds a split and decodes at most one image of it: seconds, whatever the size of the set.

    Args:
      name: a key of `DATASETS`, or a tensorflow-datasets name such as cifar10 or
        downsampled_imagenet/32x32.
      split: a key of splits.
      data_dir: where tensorflow-datasets looks; None or empty for its default directory
        ($TFDS_DATA_DIR, or ~/tensorflow_datasets).
      splits: for each split of ours the tensorflow-datasets expression for it, such as
        train[:45000]. Embedded sets have their own splits and ignore it.

    Raises:
      ConfigError: if there is no such set, it is not on disk, it has no such split, the split is
        empty, or the set's images are not 8-bit.
    """
    if split not in splits:
        raise ConfigError(f"split = {split!r} is unknown; known: {', '.join(splits)}")
    if name in DATASETS:
        return DATASETS[name](split)
    return _tfds(name, split, splits[split], data_dir or None)


def load(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    splits: Mapping[str, str] | ConfigDict = SPLITS,
) -> Dataset:
    """Decodes a split into memory. Arguments and errors are those of `describe`.

    Raises:
      ConfigError: also if the images vary in size, or a file of the set is damaged.
    """
    source = describe(name, split, data_dir=data_dir, splits=splits)
    images, labels = source.read()
    return Dataset(images, labels, source.num_levels, name, split)


# Embedded sets.

# As shipped, a writer's digits lie together: other people wrote the later parts, and these are no
# iid splits of one population.
_DIGITS = {"train": slice(0, 1000), "validation": slice(1000, 1350), "test": slice(1350, None)}


def _digits(split: str) -> Source:
    """scikit-learn's handwritten digits: 1797 images, 8×8×1, each pixel a count from 0 to 16.

    The UCI test set of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (1998).
    """
    from sklearn.datasets import load_digits

    if split not in _DIGITS:
        raise ConfigError(f"split = {split!r}: digits has only {', '.join(_DIGITS)}")
    digits = load_digits()
    images = digits.images[_DIGITS[split], :, :, None].astype(np.uint8)
    labels = digits.target[_DIGITS[split]].astype(np.int32)
    return Source(
        len(images), images.shape[1:], num_levels=17, read=lambda: (images, labels), num_classes=10
    )


DATASETS: dict[str, Callable[[str], Source]] = {"digits": _digits}


# tensorflow-datasets.


def _tfds(name: str, split: str, expression: str, data_dir: str | None) -> Source:
    """A split of a set that tensorflow-datasets has prepared on disk."""
    import tensorflow_datasets as tfds

    builder = _builder(name, data_dir)
    features = builder.info.features
    if "image" not in features:
        raise ConfigError(f"config.data.name = {name!r} has no feature called image")
    data_source = _data_source(builder, name, split, expression)
    shape = _image(next(_examples(data_source, name)), name).shape
    labelled = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
    read = functools.partial(_read, data_source, name, split, shape, labelled)
    num_classes = features["label"].num_classes if labelled else 0
    return Source(len(data_source), shape, 256, read, num_classes)


def _read(
    data_source: Any, name: str, split: str, shape: tuple[int, int, int], labelled: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Decodes every example once, about 10⁴ small images a second, into arrays made beforehand."""
    num_examples = len(data_source)
    images = np.empty((num_examples, *shape), np.uint8)
    labels = np.empty(num_examples, np.int32) if labelled else None
    examples = _examples(data_source, name)
    # A bar for the sets that take a while, on a terminal only.
    bar = tqdm(examples, f"{name} {split}", num_examples, leave=False, delay=2, disable=None)
    for index, example in enumerate(bar):
        image = _image(example, name)
        if image.shape != shape:
            raise ConfigError(
                f"config.data.name = {name!r} has images of varying size, {shape} and "
                f"{image.shape}; only sets of one size can be used"
            )
        images[index] = image
        if labelled:
            labels[index] = example["label"]
    return images, labels


def _builder(name: str, data_dir: str | None) -> Any:
    """tensorflow-datasets' description of a set, which need not have been prepared."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError) as error:
        setting = f"config.data.name = {name!r}"
        known = tfds.list_builders(with_community_datasets=False)
        base = re.split("[/:]", name)[0]
        if base in known:
            configs = [f"{base}/{config}" for config in tfds.builder_cls(base).builder_configs]
            choices = configs or [f"{base}:{tfds.builder_cls(base).VERSION}"]
            raise ConfigError(
                f"{setting}: no such config or version; known: {', '.join(choices)}"
            ) from error
        close = difflib.get_close_matches(base, [*DATASETS, *known], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"{setting} is unknown; known: {', '.join(DATASETS)} and the image sets of "
            f"tensorflow-datasets, such as cifar10{hint}"
        ) from error


def _data_source(builder: Any, name: str, split: str, expression: str) -> Any:
    """Random access to a split's records."""
    try:
        return builder.as_data_source(split=expression)
    except NotImplementedError as error:
        # This is said of a set that is missing, and of one in a format without random access.
        found = builder.info.file_format.value if builder.info.splits else ""
        there = f" (only {found} ones: delete them first)" if found else ""
        command = (
            "import tensorflow_datasets as tfds; "
            f"tfds.builder({name!r}, data_dir={str(builder.data_dir_root)!r})"
            ".download_and_prepare(file_format='array_record')"
        )
        raise ConfigError(
            f"config.data.name = {name!r}: no array_record files in {builder.data_path}{there}; "
            "prepare them where there is a network, with tensorflow and importlib_resources "
            f'installed besides, by: python -c "{command}"'
        ) from error
    except ValueError as error:
        sizes = (f"{key} ({info.num_examples})" for key, info in builder.info.splits.items())
        raise ConfigError(
            f"config.data.splits.{split} = {expression!r} is empty, or no split; {name} has "
            f"{', '.join(sizes)}, whole or sliced as in 'train[:90%]'"
        ) from error


def _examples(data_source: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """The decoded examples in their order on disk."""
    try:
        yield from data_source
    except RuntimeError as error:
        raise ConfigError(
            f"config.data.name = {name!r}: a file is missing or damaged, prepare the set again: "
            f"{error}"
        ) from error


def _image(example: Mapping[str, Any], name: str) -> UInt8[np.ndarray, "h w c"]:
    """An example's image, with a channel axis."""
    image = np.asarray(example["image"])
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ConfigError(
            f"config.data.name = {name!r} has images of type {image.dtype} and shape "
            f"{image.shape}; only uint8 of shape (height, width[, channels]) can be used"
        )
    return image if image.ndim == 3 else image[:, :, None]


# Order.


def batch_indices(
    seed: int, step: int, num_examples: int, batch_size: int
) -> Int32[np.ndarray, "batch_size"]:
    """Which examples training step number `step` sees.

    The steps walk through epochs, each a fresh permutation of the set. A batch may end one epoch
    and begin the next; none is cut short.

    Args:
      seed: the run's seed.
      step: 0-based.
      num_examples: size of the set.
      batch_size: examples in a batch, over all devices; may exceed num_examples.
    """
    positions = np.int64(step) * batch_size + np.arange(batch_size)
    epochs, offsets = np.divmod(positions, num_examples)
    indices = np.empty(batch_size, np.int32)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        indices[inside] = _epoch_order(seed, int(epoch), num_examples)[offsets[inside]]
    return indices


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> Int32[np.ndarray, "num_examples"]:
    """An epoch's permutation, from a counter-based generator with key (seed, epoch).

    It ranks the generator's raw words: numpy promises these for good, but not what its
    `permutation` makes of them (NEP 19), and a run may be resumed under another numpy.
    """
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64))
    order = np.argsort(words.random_raw(num_examples), kind="stable").astype(np.int32)
    order.flags.writeable = False  # every caller shares the cached array
    return order


def padded_batches(
    num_examples: int, batch_size: int
) -> Iterator[tuple[Int32[np.ndarray, "batch_size"], Bool[np.ndarray, "batch_size"]]]:
    """Every example once, in order, in batches of one size.

    Yields:
      indices, and a mask that is False where the last batch is filled up with repeats of the last
      example.
    """
    for start in range(0, num_examples, batch_size):
        positions = np.arange(start, start + batch_size, dtype=np.int32)
        yield np.minimum(positions, num_examples - 1), positions < num_examples
