"""Which files or subfolders are the splits of a data set, by their names."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.harness.data.sources.images import SUFFIXES
from experiments.harness.data.sources.source import SPLITS
from experiments.harness.errors import ConfigError

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
