"""What a work directory is of: its config, written once and held to on resume."""

import difflib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from diffusion.variances import VARIANCES
from experiments.harness.data.sources.source import Source
from experiments.harness.errors import ConfigError
from experiments.harness.workdir.checkpoints import is_new
from experiments.harness.workdir.files import append_jsonl, write_json

CONFIG_FILE = "config.json"
CHANGES_FILE = "config_changes.jsonl"
DATA_FILE = "data.json"

# What may change between a run and its resumption: nothing that the trained parameters depend on.
HARMLESS = (
    "analytic.",
    "data.data_dir",
    "data.memory_limit_mb",
    "data.prefetch",
    "data.stream",
    "data.workers",
    "devices.",
    "evaluate.",
    "profile.",
    "quality.",
    "sample.",
    "sigma.",
    "spacing.",
    "train.allow_changes",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.sample_every",
    "train.sample_timesteps",
    "train.skip_nonfinite",
    "train.steps_per_dispatch",
    "train.validation_timesteps",
    "variance.",
)


def check(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Raises ConfigError if the directory can't be used, or holds a run of another config."""
    directory = epath.Path(workdir)
    try:
        existing = [p for p in (directory, *directory.parents) if p.exists()]
        if existing and not existing[0].is_dir():
            raise ConfigError(
                f"workdir={workdir}: {existing[0]} is a file; give a directory, or a path where "
                "one can be made"
            )
        recorded = recorded_config(directory)
    except OSError as error:
        raise ConfigError(f"workdir={workdir} cannot be read: {error.strerror}") from error
    except ImportError as error:  # a bucket without the package for it
        raise ConfigError(f"workdir={workdir}: {error}") from error
    # A run that saved nothing has nothing to hold it to its settings.
    if recorded is not None and not is_new(workdir):
        allowed = (*HARMLESS, *config.train.allow_changes)
        allowed += ("train.num_steps",) if config.train.decay == "constant" else ()
        changed = _changes(config, recorded, lambda name: not _is_named(name, allowed))
        if changed:
            raise ConfigError(
                f"workdir={workdir} holds a run of another config: {'; '.join(changed)}; "
                "use the same settings to resume it, or another workdir"
            )


def check_data(config: ConfigDict, workdir: epath.PathLike, source: Source) -> None:
    """Raises ConfigError if the training set is of another size than at the run's beginning.

    Every batch depends on that: it is drawn from a permutation of the whole set.
    """
    now, then = _described(source), _recorded_data(workdir)
    is_allowed = _is_named("data.data_dir", tuple(config.train.allow_changes))
    if then not in (None, now) and not is_allowed and not is_new(workdir):
        raise ConfigError(
            f"workdir={workdir} holds a run on {then['num_examples']} images of shape "
            f"{tuple(then['image_shape'])}; config.data now has {now['num_examples']} of shape "
            f"{tuple(now['image_shape'])}, and the batches would be others; use the same data or "
            "another workdir, or allow it by config.train.allow_changes=('data.',)"
        )


def record_data(workdir: epath.PathLike, source: Source) -> None:
    """Writes the size of the training set to data.json."""
    now = _described(source)
    if _recorded_data(workdir) != now:
        write_json(epath.Path(workdir) / DATA_FILE, now)


def _recorded_data(workdir: epath.PathLike) -> dict[str, Any] | None:
    return _read_json(epath.Path(workdir) / DATA_FILE)


def _read_json(path: epath.Path) -> dict[str, Any] | None:
    """What a file of the work directory holds; None if it does not exist."""
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}); put it back as it was, or remove it: then nothing tells "
            "whether this run goes on as it began"
        ) from error


def _described(source: Source) -> dict[str, Any]:
    return {"num_examples": source.num_examples, "image_shape": list(source.image_shape)}


def check_names(config: ConfigDict, setting: str) -> None:
    """Raises ConfigError unless a setting lists names of settings, or sections as `data.`."""
    known = flatten(config.to_dict())
    for name in known[setting]:
        if not (isinstance(name, str) and any(_is_named(other, (name,)) for other in known)):
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"config.{setting} has {name!r}, which is no setting{hint}")


def recorded_config(workdir: epath.PathLike) -> dict[str, Any] | None:
    """The config that a work directory was trained with, as nested dictionaries; None if new."""
    return _read_json(epath.Path(workdir) / CONFIG_FILE)


def make(workdir: epath.PathLike) -> None:
    """Makes the directory where it is missing.

    Raises:
      ConfigError: if it can't be made.
    """
    with _written(workdir):
        epath.Path(workdir).mkdir(parents=True, exist_ok=True)


def record(config: ConfigDict, workdir: epath.PathLike, step: int | None = None) -> None:
    """Writes config.json; and what changed in it beyond what may, at which step of the run.

    Args:
      config: the config of now.
      workdir: the work directory, made where it is missing.
      step: that the run goes on from; None if it begins.

    Raises:
      ConfigError: if it can't be written.
    """
    make(workdir)
    recorded = recorded_config(workdir)
    with _written(workdir):
        if step is None:
            (epath.Path(workdir) / CHANGES_FILE).unlink(missing_ok=True)
        elif recorded is not None:
            changed = _changes(config, recorded, lambda name: not _is_named(name, HARMLESS))
            if changed:
                line = {"step": step, "changes": changed}
                append_jsonl(epath.Path(workdir) / CHANGES_FILE, line)
        write_json(epath.Path(workdir) / CONFIG_FILE, config.to_dict())


@contextmanager
def _written(workdir: epath.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"workdir={workdir} cannot be written ({error.strerror}); give a directory that can"
        ) from error


def forget_results(workdir: epath.PathLike) -> None:
    """Removes what was measured of an earlier run here, which may have been of other settings."""
    for name in ("evaluation.json", "eps_errors.npz", "spacing.json", "samples/samples.npz"):
        (epath.Path(workdir) / name).unlink(missing_ok=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as {"train.batch_size": 128, …}; tuples as JSON's lists."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def check_network(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Raises ConfigError unless the trained network is read as it was trained.

    Its parameters fit other settings too, which would make it another network: what it predicts,
    how the noise level or the data are put to it. How it is measured may change.
    """
    recorded = recorded_config(workdir)
    if recorded is None:
        return
    own = ["model.", "data.name", "decoder.scaling"]
    if config.model.unet.noise_input == "ddpm_timestep":
        own += ["schedule.name", f"schedule.{config.schedule.name}."]

    sigmas = config.model.variance, recorded["model"]["variance"]
    is_learned = any(VARIANCES[name]().is_learned for name in sigmas if name in VARIANCES)

    def is_own(name: str) -> bool:
        # A learned Σ_θ is part of the network; `evaluate.variance` chooses another to measure with.
        # How its training computed it is not.
        others = ("model.dtype", "model.remat", *([] if is_learned else ["model.variance"]))
        return name.startswith(tuple(own)) and name not in others

    changed = _changes(config, recorded, is_own)
    if changed:
        raise ConfigError(
            f"workdir={workdir} holds a network that was trained otherwise: {'; '.join(changed)}; "
            "leave these settings as they were"
        )


def check_writable(workdir: epath.PathLike) -> None:
    """Raises ConfigError unless files can be written here: before hours of work, not after."""
    probe = epath.Path(workdir) / f".probe.{os.getpid()}"
    try:
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"workdir={workdir} cannot be written ({error.strerror})") from error


def _is_named(name: str, names: tuple[str, ...]) -> bool:
    """Whether a setting is one of these, or in one of the sections that end in a dot."""
    return name in names or name.startswith(tuple(n for n in names if n.endswith(".")))


def _changes(
    config: ConfigDict, recorded: dict[str, Any], matters: Callable[[str], bool]
) -> list[str]:
    """The settings that matter and differ; one that only one side knows is of another version."""
    now, then = flatten(config.to_dict()), flatten(recorded)
    return [
        f"{name} was {then[name]!r}, now {now[name]!r}"
        for name in sorted(now.keys() & then.keys())
        if now[name] != then[name] and matters(name)
    ]
