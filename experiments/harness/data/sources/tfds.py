"""Image sets of tensorflow-datasets, prepared as ArrayRecord and read without TensorFlow."""

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from experiments.harness.data.sources.content import fingerprint
from experiments.harness.data.sources.images import square
from experiments.harness.data.sources.source import Directory, Source
from experiments.harness.errors import ConfigError


class Records:
    """Random access to a split's examples. It opens the files again after unpickling.

    Attributes:
      name, data_dir, split, expression: as in `tfds`.
      size: side to which images are cropped and resized; 0: they are not.
      shape: shape of every image.
      num_classes: number of classes; 0 without labels.
    """

    def __init__(
        self,
        name: str,
        data_dir: Directory,
        split: str,
        expression: str,
        size: int,
        known: Iterable[str],
    ):
        import tensorflow_datasets as tfds

        self.name, self.data_dir, self.split, self.expression = name, data_dir, split, expression
        self.size = size
        builder = _builder(name, data_dir, known)
        features = builder.info.features
        if "image" not in features:
            raise ConfigError(f"config.data.name = {name!r} has no feature called image")
        self._data_source = _data_source(builder, name, split, expression)
        self.shape = self._image(next(_examples(self._data_source, name))).shape
        labelled = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
        self.num_classes = features["label"].num_classes if labelled else 0

    def __len__(self) -> int:
        return len(self._data_source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data_source": None}

    def __call__(self, index: int) -> tuple[UInt8[np.ndarray, "h w c"], int | None]:
        """An image and its label.

        Raises:
          ConfigError: if a file is damaged, or the image differs in size from the first.
        """
        if self._data_source is None:
            builder = _builder(self.name, self.data_dir, ())
            self._data_source = _data_source(builder, self.name, self.split, self.expression)
        with _damage_explained(self.name):
            example = self._data_source[index]
        return self._decoded(example)

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """All examples in order, about 10⁴ small images a second."""
        images = np.empty((len(self), *self.shape), np.uint8)
        labels = np.empty(len(self), np.int32) if self.num_classes else None
        examples = _examples(self._data_source, self.name)
        # A progress bar on a terminal, after two seconds.
        description = f"{self.name} {self.split}"
        bar = tqdm(examples, description, len(self), leave=False, delay=2, disable=None)
        for index, example in enumerate(bar):
            images[index], label = self._decoded(example)
            if labels is not None:
                labels[index] = label
        return images, labels

    def _decoded(self, example: Mapping[str, Any]) -> tuple[UInt8[np.ndarray, "h w c"], int | None]:
        image = self._image(example)
        if image.shape != self.shape:
            raise ConfigError(
                f"config.data.name = {self.name!r} has images of varying size, {self.shape} and "
                f"{image.shape}; config.data.image_size gives them one"
            )
        return image, int(example["label"]) if self.num_classes else None

    def _image(self, example: Mapping[str, Any]) -> UInt8[np.ndarray, "h w c"]:
        image = _image(example, self.name)
        return square(image, self.size) if self.size else image


def tfds(
    name: str, split: str, expression: str, data_dir: Directory, size: int, known: Iterable[str]
) -> Source:
    """A split of a set that tensorflow-datasets has stored on disk.

    Args:
      name: a tensorflow-datasets name.
      split: train, validation or test.
      expression: the tensorflow-datasets expression for it.
      data_dir: the directory of tensorflow-datasets.
      size: as in `Records`.
      known: the names of other sets, for the message.

    Raises:
      ConfigError: as `splits.describe`.
    """
    records = Records(name, data_dir, split, expression, size, known)
    content = functools.partial(_fingerprint, name, data_dir, expression)
    return Source(
        len(records), records.shape, 256, records.read, records.num_classes, records, content
    )


def _fingerprint(name: str, data_dir: Directory, expression: str) -> str:
    """Of the files that hold some of the split's records."""
    builder = _builder(name, data_dir, ())
    if not builder.info.splits:  # a test's mock, without files
        return ""
    names = [str(path) for path in builder.info.splits[expression].filenames]
    return fingerprint(Path(builder.data_path), names)


def _builder(name: str, data_dir: Directory, others: Iterable[str]) -> Any:
    """tensorflow-datasets' description of a set, which may not be on disk."""
    import tensorflow_datasets as tfds

    setting = f"config.data.name = {name!r}"
    if "=" in name or re.match(r"\w+:[A-Za-z_]", name):
        raise ConfigError(
            f"{setting} has arguments or a namespace; only the own sets of tensorflow-datasets can "
            "be used, as name[/config][:version]"
        )
    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # its readers of damaged files raise various ones
        known = tfds.list_builders(with_community_datasets=False)
        base = re.split("[/:]", name)[0]
        if base in known and (base == name or not isinstance(error, ValueError | AssertionError)):
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{setting} is damaged, prepare it again ({reason})") from error
        if base in known:
            configs = [f"{base}/{config}" for config in tfds.builder_cls(base).builder_configs]
            choices = configs or [f"{base}:{tfds.builder_cls(base).VERSION}"]
            raise ConfigError(
                f"{setting}: no such config or version; known: {', '.join(choices)}"
            ) from error
        close = difflib.get_close_matches(base, [*others, *known], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"{setting} is unknown; known: {', '.join(others)} and the image sets of "
            f"tensorflow-datasets, such as cifar10{hint}"
        ) from error


def _data_source(builder: Any, name: str, split: str, expression: str) -> Any:
    """Random access to a split's records."""
    try:
        return builder.as_data_source(split=expression)
    except NotImplementedError as error:
        # The set is missing, or has a format without random access.
        other = builder.info.file_format.value if builder.info.splits else ""
        there = f" (only {other} ones: delete them first)" if other else ""
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
    with _damage_explained(name):
        yield from data_source


@contextmanager
def _damage_explained(name: str) -> Iterator[None]:
    """Turns the errors of array_record and Pillow at a damaged file into a ConfigError."""
    try:
        yield
    except (RuntimeError, OSError) as error:
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
