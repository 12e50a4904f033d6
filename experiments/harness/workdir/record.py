"""The config and the data of a work directory, recorded at its start and checked on resume."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from configs.base import SETTINGS
from configs.settings.declaration import shown, undeclared
from experiments.harness.errors import ConfigError
from experiments.harness.processes import distributed
from experiments.harness.workdir import parts
from experiments.harness.workdir.checkpoints import check_path, is_new
from experiments.harness.workdir.dependences import (
    FILES_OF_A_RUN,
    MEASUREMENT,
    NETWORK,
    RUN,
    is_named,
)
from experiments.harness.workdir.files import append_jsonl, read, write_json
from experiments.harness.workdir.provenance import differences, flatten

CONFIG_FILE = "config.json"
CHANGES_FILE = "config_changes.jsonl"
DATA_FILE = "data.json"
IMPORT_FILE = "import.json"  # where an imported network comes from
EVALUATIONS = "evaluations"  # the directory of all evaluations of the run


class DataSummary(NamedTuple):
    """A training set.

    Attributes:
      num_examples: its number of images.
      image_shape: (height, width, channels), or that of vectors.
      fingerprint: that of its files; None if an earlier version recorded none.
    """

    num_examples: int
    image_shape: tuple[int, ...]
    fingerprint: str | None = None


def check(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Raises ConfigError if the directory can't be used, or holds a run with another config."""
    directory = epath.Path(workdir)
    check_path(workdir)
    with _readable(workdir):
        existing = [p for p in (directory, *directory.parents) if p.exists()]
        if existing and not existing[0].is_dir():
            raise ConfigError(
                f"workdir={workdir}: {existing[0]} is a file; give a directory, or a path where "
                "one can be made"
            )
        recorded = recorded_config(directory)
    # A run without a checkpoint starts anew, with any settings.
    if recorded is not None and not is_new(workdir):
        allowed = tuple(config.train.allow_changes)
        # With a constant learning rate a longer run begins as the shorter one.
        allowed += ("train.num_steps",) if config.train.decay == "constant" else ()
        differing = differences(RUN, recorded, config).items()
        changes = {name: change for name, change in differing if not is_named(name, allowed)}
        if changes:
            raise ConfigError(
                f"workdir={workdir} holds a run of another config: {'; '.join(changes.values())}; "
                f"use the same settings to resume it, or another workdir{_permission(changes)}"
            )


def _permission(changes: Iterable[str]) -> str:
    """How a run may be continued with changed settings, if they do not change its network."""
    if any(name.startswith("model.") for name in changes):
        return ""
    return f', or allow it by --config.train.allow_changes="{tuple(changes)}"'


def open_run(workdir: epath.PathLike) -> None:
    """Registers the parts of a run, and compares its settings with those of this version.

    Call it before the run's config is used. A directory without a run is left as it is. Settings
    that an earlier version did not have are reported, and have their defaults.

    Raises:
      ConfigError: if a part cannot be registered, or config.json has a setting of another version.
    """
    with _readable(workdir):
        _check_kinds(epath.Path(workdir))
        parts.register(workdir)
        recorded = recorded_config(workdir)
    if recorded is None:
        return
    settings, path = flatten(recorded), epath.Path(workdir) / CONFIG_FILE
    unknown = list(undeclared(recorded, SETTINGS))
    groups = {name[:end] for name, _ in SETTINGS.flat() for end in _dots(name)}
    if values := sorted(groups & set(settings)):
        raise ConfigError(f"{path} is damaged: {_some(values)} must hold settings of its own")
    missing = [name for name, _ in SETTINGS.flat() if name not in settings]
    lacks = f"lacks {_some(missing)}" if missing else ""
    if unknown:
        values = [f"{n} = {shown(settings[n])}" if n in settings else n for n in unknown]
        raise ConfigError(
            f"{path} is of another version: it has {_some(values)}, unknown to this one"
            f"{lacks and f', and {lacks}'}; rename or remove what is unknown in this file, or use "
            "the version that wrote it (its commit is in sessions.jsonl)"
        )
    if missing:
        tqdm.write(
            f"{path} is of an earlier version: it {lacks}; defaults are used, unless "
            "--config.NAME=VALUE sets others"
        )


def _dots(name: str) -> Iterator[int]:
    """The places of the dots of a setting's name."""
    return (place for place, letter in enumerate(name) if letter == ".")


def _check_kinds(workdir: epath.Path) -> None:
    """Raises ConfigError for a file in the place of a directory of a run, or the reverse."""
    directories = (
        "checkpoints",
        "interrupted",
        "damaged_checkpoints",
        "samples",
        EVALUATIONS,
        MEASUREMENT,
    )
    files = (CONFIG_FILE, CHANGES_FILE, DATA_FILE, "metrics.jsonl", "sessions.jsonl")
    for name in (*directories, *files, "evaluations.jsonl", *FILES_OF_A_RUN):
        path = workdir / name
        if path.exists() and path.is_dir() != (name in directories):
            wrong, right = ("file", "directory") if name in directories else ("directory", "file")
            raise ConfigError(f"{path} is a {wrong}, and a run has a {right} there; move it away")


def _some(names: list[str]) -> str:
    """The first names of a list, and the number of the others."""
    more = [f"{len(names) - 4} more"] if len(names) > 5 else []
    return ", ".join([*names[: 4 if more else 5], *more])


def check_new(workdir: epath.PathLike) -> None:
    """Raises ConfigError if the directory holds a run, or an imported network."""
    with _readable(workdir):
        if not is_new(workdir):
            raise ConfigError(f"workdir={workdir} holds a run; import into a new directory")


def check_trainable(workdir: epath.PathLike) -> None:
    """Raises ConfigError if the directory holds an imported network, whose weights are alone."""
    if (epath.Path(workdir) / IMPORT_FILE).exists():
        raise ConfigError(
            f"workdir={workdir} holds an imported network, which has no state of a training; "
            f"train it in another one: --config=configs/recorded.py:{workdir} --workdir=NEW "
            f"--config.train.init_from={workdir}"
        )


def check_data(config: ConfigDict, workdir: epath.PathLike, data: DataSummary) -> None:
    """Raises ConfigError if the training set is not the one that the run began with."""
    recorded = _recorded_data(workdir)
    is_allowed = is_named("data.data_dir", tuple(config.train.allow_changes))
    if recorded is None or is_allowed or is_new(workdir):
        return
    remedy = (
        "the run may have been trained on images that are held out now, and would go on with "
        "other batches; use the same data or another workdir, or allow it by "
        "config.train.allow_changes=('data.',)"
    )
    if recorded[:2] != data[:2]:
        raise ConfigError(
            f"workdir={workdir} holds a run on {recorded.num_examples} images of shape "
            f"{recorded.image_shape}; config.data now has {data.num_examples} of shape "
            f"{data.image_shape}: {remedy}"
        )
    if recorded.fingerprint not in (None, data.fingerprint):
        raise ConfigError(
            f"workdir={workdir} holds a run on other training images: as many as those in "
            f"config.data.data_dir = {config.data.data_dir!r}, but the fingerprint of their files "
            f"is {data.fingerprint}, and was {recorded.fingerprint}: {remedy}"
        )


def record_data(workdir: epath.PathLike, data: DataSummary) -> None:
    """Writes the summary of the training set to data.json."""
    recorded = _recorded_data(workdir)
    if recorded is not None and recorded.fingerprint is None and data.fingerprint:
        tqdm.write(
            f"{workdir} has no fingerprint of the training images, since an earlier version began "
            "it; that of the present ones is recorded now, unchecked"
        )
    if recorded != data:
        write_json(epath.Path(workdir) / DATA_FILE, data._asdict())


def _recorded_data(workdir: epath.PathLike) -> DataSummary | None:
    def parse(recorded):
        shape = tuple(int(size) for size in recorded["image_shape"])
        return DataSummary(int(recorded["num_examples"]), shape, recorded.get("fingerprint"))

    return _read(epath.Path(workdir) / DATA_FILE, parse)


def _read(path: epath.Path, parse: Callable[[dict[str, Any]], Any]) -> Any:
    """The record in a file; None if it does not exist."""
    remedy = (
        "restore it, or remove it: then nothing can check that the resumed run has the same "
        "settings and data"
    )
    return read(path, parse, remedy)


def recorded_config(workdir: epath.PathLike) -> dict[str, Any] | None:
    """The config of a work directory's training, as nested dictionaries; None if it has none."""
    return _read(epath.Path(workdir) / CONFIG_FILE, _parse_config)


def _parse_config(recorded: dict[str, Any]) -> dict[str, Any]:
    sections = ("data", "schedule", "model", "decoder", "train", "evaluate", "sample")
    for name in sections:
        if not isinstance(recorded[name], dict):
            raise TypeError(f"{name} is no section")
    return recorded


def make(workdir: epath.PathLike) -> None:
    """Makes the directory if it does not exist; raises ConfigError if it can't."""
    with _written(workdir):
        epath.Path(workdir).mkdir(parents=True, exist_ok=True)


def record(config: ConfigDict, workdir: epath.PathLike, step: int | None = None) -> None:
    """Writes config.json and parts.json, and appends what changed to config_changes.jsonl.

    Args:
      config: the present config.
      workdir: the work directory; made if it does not exist.
      step: the step at which the run resumes; None if it starts.

    Raises:
      ConfigError: if it can't be written.
    """
    make(workdir)
    recorded = recorded_config(workdir)
    with _written(workdir):
        if step is None:
            (epath.Path(workdir) / CHANGES_FILE).unlink(missing_ok=True)
        elif recorded is not None and (changes := differences(RUN, recorded, config)):
            line = {"step": step, "changes": list(changes.values())}
            append_jsonl(epath.Path(workdir) / CHANGES_FILE, line)
        parts.record(config, workdir)
        write_json(epath.Path(workdir) / CONFIG_FILE, config.to_dict())


@contextmanager
def _readable(workdir: epath.PathLike) -> Iterator[None]:
    """Turns an error of reading into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"workdir={workdir} cannot be read: {error.strerror}") from error
    except ImportError as error:  # a bucket without the package for it
        raise ConfigError(f"workdir={workdir}: {error}") from error


@contextmanager
def _written(workdir: epath.PathLike) -> Iterator[None]:
    """Turns an error of writing into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"workdir={workdir} cannot be written ({error.strerror}); give a directory that can"
        ) from error


def forget_results(workdir: epath.PathLike) -> None:
    """Removes the results of an earlier run in this directory."""
    for name in FILES_OF_A_RUN:
        (epath.Path(workdir) / name).unlink(missing_ok=True)
    for name in (EVALUATIONS, MEASUREMENT):
        directory = epath.Path(workdir) / name
        if distributed.is_first() and directory.exists():
            directory.rmtree()


def check_network(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Raises ConfigError if the config gives the trained parameters another meaning.

    The parameters fit other settings too, but then they are another network: with another
    prediction, or another scaling of the noise level or the data.
    """
    recorded = recorded_config(workdir)
    changes = {} if recorded is None else differences(NETWORK, recorded, config)
    if changes:
        raise ConfigError(
            f"workdir={workdir} holds a network that was trained otherwise: "
            f"{'; '.join(changes.values())}; leave these settings as they were"
        )


def check_writable(workdir: epath.PathLike) -> None:
    """Raises ConfigError if no files can be written here: before hours of work, not after."""
    probe = epath.Path(workdir) / f".probe.{os.getpid()}"
    try:
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"workdir={workdir} cannot be written ({error.strerror})") from error
