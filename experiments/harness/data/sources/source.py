"""A split of a data set before it is decoded, and the tools that all formats share."""

import functools
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Integer, Shaped
from ml_collections import ConfigDict
from numpy.typing import ArrayLike, DTypeLike
from tqdm import tqdm

from experiments.harness.data.sources.images import SUFFIXES
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


_SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}


def split_paths(root: Path, ending: str, splits: Mapping[str, str] | ConfigDict) -> dict[str, Path]:
    """Files or subfolders that hold a split, under the names of `splits` or usual spellings.

    A split whose name is the default may be spelt otherwise: Train, training, val, valid, ….

    Args:
      root: the folder that holds them.
      ending: ending of the files; empty for subfolders.
      splits: the set's own name of each split.

    Returns:
      The paths by split.

    Raises:
      ConfigError: if two spellings of a split exist, or something looks like a missing split.
    """

    def fits(path: Path) -> bool:
        kind = path.is_file() if ending else path.is_dir()
        return kind and path.name.lower().endswith(ending) and path.name[0] != "."

    entries = [path for path in sorted(root.iterdir()) if fits(path)]
    paths = {name: root / f"{splits[name]}{ending}" for name in splits}
    paths = {name: path for name, path in paths.items() if fits(path)}
    for name in SPLITS.keys() & splits.keys() - paths.keys():
        spelt = [e for e in entries if _stem(e, ending).lower() in _SPELLINGS[name]]
        if splits[name] != name or not spelt:
            continue
        if len(spelt) > 1:
            raise ConfigError(
                f"{root} has {' and '.join(path.name for path in spelt)}; say which one is "
                f"{name} by config.data.splits.{name}={_stem(spelt[0], ending)}, or remove one"
            )
        paths[name] = spelt[0]
    rest = [path for path in entries if path not in paths.values()]
    looks: dict[str, Path] = {}
    for path in rest:
        for name in _resembled(_stem(path, ending)):
            looks.setdefault(name, path)
    for name in (name for name in SPLITS if name in looks):
        if name in splits.keys() - paths.keys() and (paths or len(looks) > 1):
            path, stem = looks[name], _stem(looks[name], ending)
            raise ConfigError(
                f"{path} looks like the split {name}, but would not be read as one; set "
                f"config.data.splits.{name}={stem} if it is, else move it away or rename it"
            )
    if not ending:
        rest += [path for path in sorted(root.iterdir()) if path.name.lower().endswith(SUFFIXES)]
    if paths and rest:
        _report_left_out(root, tuple(path.name for path in rest if path.name[0] != "."))
    return paths


@functools.cache
def _report_left_out(root: Path, names: tuple[str, ...]) -> None:
    """Prints, once in a process, what lies beside the splits of a folder."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    shown = ", ".join(repr(name) for name in names[:5])
    tqdm.write(f"{str(root)!r}: left out {shown}{more}, which are no splits in use")


def _stem(path: Path, ending: str) -> str:
    return path.name[: len(path.name) - len(ending)]


# Of single words; the lone short ones are too frequent as the beginning of others.
_RESEMBLING = {
    "train": re.compile(r"train.*|tr"),
    "validation": re.compile(r"valid.*|(val|dev)(s|set)?"),
    "test": re.compile(r"test.*|ts|(eval|holdout)(s|set)?"),
}


def _words(name: str) -> list[str]:
    """The words of a name in lower case: train2017, test_images, TrainImages and imagesTr too."""
    return [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def _resembled(name: str) -> list[str]:
    """The splits that a word of a name means."""
    words = _words(name)
    return [split for split, known in _RESEMBLING.items() if any(map(known.fullmatch, words))]


def check_not_pooled(root: Path, names: Sequence[str]) -> None:
    """Raises ConfigError if a folder without splits has subfolders or files that look like some.

    Files count if all are in one folder, and most of them look like a split: train_0.png, ….

    Args:
      root: the folder.
      names: the files' names in it.
    """
    places = {os.path.dirname(name): _resembled_along(os.path.dirname(name)) for name in names}
    if len(places) == 1:
        files = {name: _resembled(Path(name).stem) for name in names}
        if sum(map(bool, files.values())) > len(names) / 2:
            places = files
    looks: dict[str, str] = {}
    for place, found in places.items():
        for split in found:
            looks.setdefault(split, place)
    if len(set(looks.values())) > 1:
        first = next(iter(looks.items()))
        second = next(other for other in looks.items() if other[1] != first[1])
        raise ConfigError(
            f"config.data.data_dir = {str(root)!r} has no subfolders train, validation and test, "
            f"so its {len(names)} images would be pooled and split by a seed, but {first[1]} looks "
            f"like {first[0]} and {second[1]} like {second[0]}; give the folder that holds the "
            "splits, with classes inside them, or rename them"
        )


def _resembled_along(place: str) -> list[str]:
    return [split for word in place.split("/") for split in _resembled(word)]


def check_no_sibling_split(path: Path, ending: str) -> None:
    """Raises ConfigError if a set to be split by a seed is itself a split, beside another one.

    Such as train.npz beside test.npz, or photos_train beside photos_test.

    Args:
      path: the set.
      ending: ending of the files; empty for folders.
    """
    path = path.absolute()
    stem = _stem(path, ending)
    own = _resembled(stem)
    if not own:
        return
    try:
        siblings = [sibling for sibling in sorted(path.parent.iterdir()) if sibling != path]
    except OSError:  # the set can be read, but not the folder around it
        return
    for sibling in siblings:
        kind = sibling.is_file() if ending else sibling.is_dir()
        if not kind or not sibling.name.lower().endswith(ending):
            continue
        name = _stem(sibling, ending)
        others = [split for split in _resembled(name) if split not in own]
        if others and _without_splits(stem) in (("*",), _without_splits(name)):
            raise ConfigError(
                f"config.data.data_dir = {str(path)!r} would be split by a seed, but it looks like "
                f"{own[0]}, and {sibling.name} beside it like {others[0]}; to use both give "
                f"{str(path.parent)!r}, with config.data.splits if it asks for them; if "
                f"{path.name} is the whole set, rename it or move it to a folder of its own"
            )


def _without_splits(name: str) -> tuple[str, ...]:
    """The words of a name, with * for each that means a split."""
    return tuple("*" if _resembled(word) else word for word in _words(name))


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
