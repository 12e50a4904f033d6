"""What a work directory is of: its config, written once and held to on resume."""

import json
import os
from collections.abc import Callable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from diffusion.variances import VARIANCES
from experiments.harness.checkpoints import is_new
from experiments.harness.errors import ConfigError
from experiments.harness.metrics import write_json

CONFIG_FILE = "config.json"

# What may change between a run and its resumption: nothing that the trained parameters depend on.
HARMLESS = (
    "analytic.",
    "data.data_dir",
    "evaluate.",
    "quality.",
    "sample.",
    "sigma.",
    "spacing.",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.sample_every",
    "train.sample_timesteps",
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
        harmless = HARMLESS + (("train.num_steps",) if config.train.decay == "constant" else ())
        changed = _changes(config, recorded, lambda name: not name.startswith(harmless))
        if changed:
            raise ConfigError(
                f"workdir={workdir} holds a run of another config: {'; '.join(changed)}; "
                "use the same settings to resume it, or another workdir"
            )


def recorded_config(workdir: epath.PathLike) -> dict[str, Any] | None:
    """The config that a work directory was trained with, as nested dictionaries; None if new."""
    path = epath.Path(workdir) / CONFIG_FILE
    return json.loads(path.read_text()) if path.exists() else None


def record(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes config.json, making the directory where it is missing.

    Raises:
      ConfigError: if it can't be written.
    """
    try:
        epath.Path(workdir).mkdir(parents=True, exist_ok=True)
        write_json(epath.Path(workdir) / CONFIG_FILE, config.to_dict())
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
        return name.startswith(tuple(own)) and (is_learned or name != "model.variance")

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
