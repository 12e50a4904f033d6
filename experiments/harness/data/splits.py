"""Data sets by name, and the order in which training and evaluation visit them.

A set is an array of grey levels, in memory or read as it is needed (`loader`). The order of
training examples is a function of (seed, step), so a run needs no iterator state to resume, and no
batch depends on the machine or on the number of devices.

To add a set that comes with its own splits, write a function from a split's name to a `Source` and
list it in `DATASETS`; for files of a further format, one of the arguments of `FORMATS`. Any other
name is an image set of tensorflow-datasets.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int, Int32, UInt8
from ml_collections import ConfigDict

from diffusion.schedules import Array
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

# From how many examples there are to the places of those that are wanted.
Choose = Callable[[int], Int[np.ndarray, "m"]]


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


_SOME = (2**64 - 1, 0)  # no seed of a run is so large

# Sets that come with their own splits.
DATASETS: dict[str, Callable[[str], Source]] = {"digits": digits, "photos": photos}

# Files of the user's own, in `data.data_dir`.
FORMATS: dict[str, Callable[..., Source]] = {"folder": folder, "npz": npz, "idx": idx}


def describe(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    splits: Mapping[str, str] | ConfigDict = SPLITS,
    options: Options = DEFAULTS,
) -> Source:
    """Finds a split and decodes at most one image of it: seconds, whatever the size of the set.

    Only `options.skip_corrupt` has it decode every file of a folder, once in a process.

    Args:
      name: a key of `DATASETS` or of `FORMATS`, or a tensorflow-datasets name such as cifar10 or
        downsampled_imagenet/32x32.
      split: a key of splits.
      data_dir: the files of a format; or where tensorflow-datasets looks, None or empty for its
        default directory ($TFDS_DATA_DIR, or ~/tensorflow_datasets).
      splits: what each split of ours is called: a tensorflow-datasets expression, such as
        train[:45000], a subfolder, or a .npz file's name. Other sets ignore it.
      options: of the formats.

    Raises:
      ConfigError: if there is no such set, it is not on disk, it has no such split, the split is
        empty, or the set's images are not 8-bit.
    """
    if split not in splits:
        raise ConfigError(f"split = {split!r} is unknown; known: {', '.join(splits)}")
    if name in DATASETS:
        return DATASETS[name](split)
    if name in FORMATS:
        return FORMATS[name](data_dir or None, split, splits, options)
    known = (*DATASETS, *FORMATS)
    return tfds(name, split, splits[split], data_dir or None, options.image_size, known)


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
      choose: the places of the examples that are wanted, given how many there are; None: all. The
        others are not decoded, where a set comes as single images.

    Raises:
      ConfigError: also if the images vary in size, a file of the set is damaged, or a label is none
        of the training split's.
    """
    source = describe(name, split, data_dir=data_dir, splits=splits, options=options)
    if choose is None:
        images, labels = source.read()
    else:
        images, labels = _read_some(source, choose(source.num_examples), f"{name} {split}")
    if source.num_classes and labels.max(initial=-1) >= source.num_classes:
        raise ConfigError(
            f"config.data.name = {name!r}: {split} has the label {labels.max()}; the labels of "
            f"train end at {source.num_classes - 1}"
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
    return read_each(get, len(places), source.image_shape, description, labelled)


def first(limit: int) -> Choose:
    """For `load`: the first examples, at most so many."""
    return lambda num_examples: np.arange(min(limit, num_examples))


def some(limit: int) -> Choose:
    """For `load`: at most so many examples, which stand for all.

    Always the same, from anywhere in the set: files are often sorted by class. In rising order.
    """
    return lambda num_examples: np.sort(permutation(_SOME, num_examples)[:limit])


Labelled = TypeVar("Labelled", Dataset, Examples)


def load_data(config: ConfigDict, split: str, choose: Choose | None = None) -> Dataset:
    """A split of the config's data set, decoded; with labels where the model is given them.

    Args:
      config: the config.
      split: train, validation or test.
      choose: `data.first` or `data.some` of its examples; None: all.

    Raises:
      ConfigError: also if a class-conditional model meets an example without a label.
    """
    examples = load(**_data_arguments(config), split=split, choose=choose)
    return with_labels(config, examples, split)


def with_labels(config: ConfigDict, examples: Labelled, split: str) -> Labelled:
    """A data set, or some examples of it, with labels where the model is given them.

    Raises:
      ConfigError: if a class-conditional model meets an example without a label.
    """
    if not config.model.class_conditional:
        return examples._replace(labels=None)
    if examples.labels is None or examples.labels.min() < 0:
        raise ConfigError(unlabelled_message(config, split))
    return examples


def load_measured(config: ConfigDict, split: str, choose: Choose | None = None) -> Dataset:
    """A split, or some of it, as it is measured: with labels unless `evaluate.labels` withholds."""
    dataset = load_data(config, split, choose)
    return dataset if config.evaluate.labels else dataset._replace(labels=None)


def check_labels(config: ConfigDict) -> None:
    """Raises ConfigError if the labels are withheld from a network that always had them."""
    withheld = config.model.class_conditional and not config.evaluate.labels
    if withheld and config.train.label_dropout == 0:
        raise ConfigError(
            "config.evaluate.labels = False, but with config.train.label_dropout = 0 the network "
            "has learned nothing of examples without a label; use True"
        )


def unlabelled_message(config: ConfigDict, split: str) -> str:
    return (
        f"config.model.class_conditional = True: not every example of {config.data.name}, {split}, "
        "has a label; use False, or a set with labels"
    )


def describe_data(config: ConfigDict, split: str) -> Source:
    """A split of the config's data set, found but not decoded."""
    return describe(**_data_arguments(config), split=split)


def check_split(config: ConfigDict, split: str) -> Source:
    """A split that is to be measured with the model, found but not decoded.

    Raises:
      ConfigError: also if its images are not of the training split's kind.
    """
    train, found = describe_data(config, "train"), describe_data(config, split)
    for name, what in (("image_shape", "images of shape"), ("num_levels", "grey levels:")):
        here, there = getattr(found, name), getattr(train, name)
        if here != there:
            raise ConfigError(
                f"config.data.name = {config.data.name!r}: {split} has {what} {here}, train "
                f"{there}; the model is made for those of train"
            )
    if config.model.class_conditional and not found.num_classes:
        raise ConfigError(unlabelled_message(config, split))
    return found


def _data_arguments(config: ConfigDict) -> dict[str, Any]:
    return {
        "name": config.data.name,
        "data_dir": config.data.data_dir,
        "splits": config.data.splits,
        "options": Options.of(config.data),
    }
