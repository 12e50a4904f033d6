"""Data sets by name, and their splits.

To add a set with splits of its own, write a function from a split's name to a `Source` and list it
in `DATASETS`. To add a file format, write a function with the arguments of those in `FORMATS` and
list it there. Any other name is an image set of tensorflow-datasets.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Int, Int32, Shaped
from ml_collections import ConfigDict

from diffusion.schedules import Array
from experiments.harness import paths
from experiments.harness.data.sources.arrays import npz
from experiments.harness.data.sources.embedded import digits, photos
from experiments.harness.data.sources.folder import folder
from experiments.harness.data.sources.idx import idx
from experiments.harness.data.sources.source import (
    DEFAULTS,
    SPLITS,
    Options,
    Source,
    permutation,
    read_each,
)
from experiments.harness.data.sources.tfds import tfds
from experiments.harness.errors import ConfigError

# From the number of examples in a split to the places of the selected ones.
Choose = Callable[[int], Int[np.ndarray, "m"]]


class Examples(NamedTuple):
    """Some examples of a data set, as one argument of a compiled program.

    Attributes:
      images: grey levels; of continuous data, floats in data units.
      labels: class indices; None if the set has none, or the model gets none.
    """

    images: Shaped[Array, "b *d"]
    labels: Int32[Array, "b"] | None


class Dataset(NamedTuple):
    """A decoded split.

    Attributes:
      images: grey levels 0..num_levels−1; of continuous data, floats in data units.
      labels: class indices, or None if the set has none.
      num_levels: number of grey levels that a pixel can have; 0 for continuous data.
      name: `data.name` of the config.
      split: train, validation or test.
    """

    images: Shaped[np.ndarray, "n *d"]
    labels: Int32[np.ndarray, "n"] | None
    num_levels: int
    name: str
    split: str

    def examples(self, index: Int[np.ndarray, "b"] | slice) -> Examples:
        """The examples at these places."""
        return Examples(self.images[index], jax.tree.map(lambda a: a[index], self.labels))


_SELECTION_KEY = (2**64 - 1, 0)  # no seed of a run is so large

# Sets with splits of their own.
DATASETS: dict[str, Callable[[str], Source]] = {"digits": digits, "photos": photos}

# Formats of the user's files in `data.data_dir`.
FORMATS: dict[str, Callable[..., Source]] = {"folder": folder, "npz": npz, "idx": idx}


def describe(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    splits: Mapping[str, str] | ConfigDict = SPLITS,
    options: Options = DEFAULTS,
) -> Source:
    """Finds a split and decodes at most one image of it, which takes seconds for any size.

    Only with `options.skip_corrupt` it decodes every file of a folder, once in a process.

    Args:
      name: a key of `DATASETS` or of `FORMATS`, or a tensorflow-datasets name such as cifar10 or
        downsampled_imagenet/32x32.
      split: a key of splits.
      data_dir: the files of a format; or the directory of tensorflow-datasets, None or empty for
        its default ($TFDS_DATA_DIR, or ~/tensorflow_datasets).
      splits: the set's own name of each split: a tensorflow-datasets expression, such as
        train[:45000], a subfolder, or a .npz file's name. Other sets ignore it.
      options: settings of the formats.

    Raises:
      ConfigError: if there is no such set, it is not on disk, it has no such split, the split is
        empty, or the set's images are not 8-bit.
    """
    if split not in splits:
        raise ConfigError(f"split = {split!r} is unknown; known: {', '.join(splits)}")
    if name in DATASETS:
        return DATASETS[name](split)
    data_dir = paths.expanded(data_dir, "config.data.data_dir") if data_dir else None
    if name in FORMATS:
        try:
            return FORMATS[name](data_dir, split, splits, options)
        except OSError as error:
            raise ConfigError(
                f"config.data.data_dir = {data_dir!r} cannot be read ({error.strerror})"
            ) from error
    known = (*DATASETS, *FORMATS)
    return tfds(name, split, splits[split], data_dir, options.image_size, known)


def load(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    splits: Mapping[str, str] | ConfigDict = SPLITS,
    options: Options = DEFAULTS,
    choose: Choose | None = None,
) -> Dataset:
    """Decodes a split into memory. Other arguments and errors are those of `describe`.

    Args:
      choose: selects examples; None: all. The others are not decoded if the set is stored as
        single images.

    Raises:
      ConfigError: also if the images vary in size, a file of the set is damaged, or a label does
        not occur in the training split.
    """
    source = describe(name, split, data_dir=data_dir, splits=splits, options=options)
    if choose is None:
        images, labels = source.read()
    else:
        images, labels = _read_some(source, choose(source.num_examples), f"{name} {split}")
    if images.shape[1:] != tuple(source.image_shape):
        raise ConfigError(
            f"config.data.name = {name!r}: the examples of {split} have the shape "
            f"{images.shape[1:]}, and its source says {source.image_shape}"
        )
    return Dataset(images, labels, source.num_levels, name, split)


def _read_some(
    source: Source, places: Int[np.ndarray, "m"], description: str
) -> tuple[np.ndarray, np.ndarray | None]:
    if source.get is None:
        images, labels = source.read()
        return images[places], None if labels is None else labels[places]

    def get(number):
        return source.get(int(places[number]))

    labelled = source.num_classes > 0
    shape, dtype = source.image_shape, source.dtype
    return read_each(get, len(places), shape, description, labelled, dtype)


def first(limit: int) -> Choose:
    """For `load`: the first examples, at most `limit`."""
    return lambda num_examples: np.arange(min(limit, num_examples))


def some(limit: int) -> Choose:
    """For `load`: a fixed random selection of at most `limit` examples, in ascending order.

    Random, since files are often sorted by class.
    """
    return lambda num_examples: np.sort(permutation(_SELECTION_KEY, num_examples)[:limit])


Labelled = TypeVar("Labelled", Dataset, Examples)


def load_data(config: ConfigDict, split: str, choose: Choose | None = None) -> Dataset:
    """A split of the config's data set, decoded; with labels if the model gets them.

    Args:
      config: the config.
      split: train, validation or test.
      choose: `first` or `some`; None: all examples.

    Raises:
      ConfigError: also if an example for a class-conditional model has no label.
    """
    examples = load(**_data_arguments(config), split=split, choose=choose)
    return with_labels(config, examples, split)


def with_labels(config: ConfigDict, examples: Labelled, split: str) -> Labelled:
    """A data set, or some examples of it, with labels if the model gets them.

    Raises:
      ConfigError: if an example for a class-conditional model has no label.
    """
    if not config.model.class_conditional:
        return examples._replace(labels=None)
    if examples.labels is None or examples.labels.min() < 0:
        place = None if examples.labels is None else int(examples.labels.argmin())
        reason = "" if place is None else f"the one at {place} has {examples.labels[place]}"
        raise ConfigError(unlabelled_message(config, split, reason))
    return examples


def load_measured(config: ConfigDict, split: str, choose: Choose | None = None) -> Dataset:
    """A split, or a part of it, for measurements: without labels if `evaluate.labels` is False."""
    dataset = load_data(config, split, choose)
    return dataset if config.evaluate.labels else dataset._replace(labels=None)


def unlabelled_message(config: ConfigDict, split: str, reason: str = "") -> str:
    reason = f" ({reason})" if reason else ""
    return (
        f"config.model.class_conditional = True: not every example of {config.data.name}, {split}, "
        f"has a label{reason}; use False, or a set with labels"
    )


def describe_data(config: ConfigDict, split: str) -> Source:
    """A split of the config's data set, found but not decoded."""
    return describe(**_data_arguments(config), split=split)


def fingerprints(config: ConfigDict) -> Callable[[str], str | None]:
    """From a split's name to the fingerprint of its files; None if they cannot be read."""

    def fingerprint(split: str) -> str | None:
        try:
            return describe_data(config, split).fingerprint()
        except ConfigError:
            return None

    return fingerprint


def check_split(config: ConfigDict, split: str) -> Source:
    """A split for measurements with the model, found but not decoded.

    Raises:
      ConfigError: also if its images differ in shape or grey levels from the training split's.
    """
    train, source = describe_data(config, "train"), describe_data(config, split)
    for name, what in (("image_shape", "images of shape"), ("num_levels", "grey levels:")):
        here, there = getattr(source, name), getattr(train, name)
        if here != there:
            raise ConfigError(
                f"config.data.name = {config.data.name!r}: {split} has {what} {here}, train "
                f"{there}; the model is made for those of train"
            )
    if config.model.class_conditional and not source.num_classes:
        raise ConfigError(unlabelled_message(config, split, source.unlabelled))
    return source


def _data_arguments(config: ConfigDict) -> dict[str, Any]:
    return {
        "name": config.data.name,
        "data_dir": config.data.data_dir,
        "splits": config.data.splits,
        "options": Options.of(config.data),
    }
