"""From the axes of a study to its cells: each combination of values, as a config."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from ml_collections import ConfigDict

from configs.base import SETTINGS
from configs.settings.declaration import shown, suggestion, value_of
from experiments.harness.errors import ConfigError
from experiments.harness.study.summary import Key
from experiments.harness.workdir.dependences import MEASUREMENT, depends, group
from experiments.harness.workdir.provenance import fingerprint, flatten

MOST_CELLS = 10_000
_LONGEST = 150  # characters of a file's name
Axes = dict[str, dict[str, dict[str, Any]]]
"""For each axis, the settings of each of its values by the value's name."""

_DECLARED = dict(SETTINGS.flat())
_UNPAIRED = ("data set", "images", "place")  # groups of settings that change the data


class Study(NamedTuple):
    """The cells of a study.

    Attributes:
      axes: the axes.
      baseline: the cell with which the others are compared.
      cells: the config of each cell, in the order of the grid. `seed` is the one of the evaluation.
    """

    axes: Axes
    baseline: Key
    cells: dict[Key, ConfigDict]


def expand(config: ConfigDict) -> Study:
    """The study that a config describes.

    Raises:
      ConfigError: for axes that are empty, name a setting that does not exist or a value that it
        can't have, or change the data; and for a baseline that is not a cell.
    """
    axes = _axes(config)
    num_cells = math.prod(len(values) for values in axes.values())
    if num_cells > MOST_CELLS:
        raise ConfigError(
            f"config.ablate.axes has {num_cells:,} combinations; use at most {MOST_CELLS:,}"
        )
    grid = list(itertools.product(*axes.values()))
    baseline = config.ablate.baseline or grid[0]
    if baseline not in grid:
        names = "; ".join(f"{axis}: {', '.join(values)}" for axis, values in axes.items())
        raise ConfigError(
            f"config.ablate.baseline = {shown(baseline)}; it must name a value of each axis, in "
            f"this order: {names}"
        )
    return Study(axes, baseline, {key: _cell(config, axes, key) for key in grid})


def file_name(names: Iterable[str]) -> str:
    """Some names as the name of a file; different ones for different names."""
    text = ",".join(quote(name, safe="=") for name in names)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 13]},{fingerprint(text)}"


def named(key: Key) -> str:
    """A cell for people."""
    return ", ".join(key)


def require_different(cells: Mapping[Key, ConfigDict]) -> None:
    """Raises ConfigError if two cells differ in nothing that is measured."""
    seen: dict[str, Key] = {}
    for key, config in cells.items():
        first = seen.setdefault(json.dumps(identity(MEASUREMENT, config)), key)
        if first != key:
            raise ConfigError(
                f"config.ablate.axes: the cells ({named(first)}) and ({named(key)}) are the same: "
                "no setting in which they differ changes what is measured; leave one of them out"
            )


def identity(result: str, config: ConfigDict) -> dict[str, Any]:
    """The settings that determine a result; with those of the speed, if that is measured."""
    settings = flatten(config.to_dict())
    names = depends(result, settings)
    if "speed" in config.ablate.measures:
        names |= {name for name in settings if group(name) == "speed"}
    return {name: settings[name] for name in sorted(names)}


def _axes(config: ConfigDict) -> Axes:
    """The axes with the settings of each value, checked one by one."""
    if not config.ablate.axes:
        raise ConfigError(
            "config.ablate.axes = (); a study has at least one axis, as in "
            "(('train.objective', ('vlb', 'simple')),)"
        )
    axes: Axes = {}
    for axis, values in config.ablate.axes:
        if not values:
            raise ConfigError(f"config.ablate.axes: the axis {axis!r} has no values")
        if isinstance(values, tuple):
            names = [str(value) for value in values]
            if len(set(names)) < len(names):
                raise ConfigError(
                    f"config.ablate.axes: the axis {axis!r} has a value twice: {shown(values)}"
                )
            values = {str(value): {axis: value} for value in values}
        axes[axis] = {name: dict(settings) for name, settings in values.items()}
    for axis, setting, value in _settings(axes):
        _check(config, axis, setting, value)
    owners: dict[str, str] = {}
    for axis, setting, _ in _settings(axes):
        if owners.setdefault(setting, axis) != axis:
            raise ConfigError(
                f"config.ablate.axes: both {owners[setting]!r} and {axis!r} set {setting}; one "
                "axis can set several settings together"
            )
    return axes


def _settings(axes: Axes) -> Iterator[tuple[str, str, Any]]:
    """Each setting with its axis and value."""
    for axis, values in axes.items():
        for settings in values.values():
            yield from ((axis, name, value) for name, value in settings.items())


def _check(config: ConfigDict, axis: str, name: str, value: Any) -> None:
    """Raises ConfigError if the setting doesn't exist, can't have the value or changes the data."""
    where = f"config.ablate.axes, axis {axis!r}"
    existing = flatten(config.to_dict())
    if name not in existing:
        hint = suggestion(str(name), existing)
        raise ConfigError(
            f"{where}: {name} is no setting{hint and f'; did you mean {hint}?'} (an axis of named "
            "values is a dictionary: {'name': {'setting': value, …}, …})"
        )
    if name in _DECLARED:
        problem = _DECLARED[name].kind.problem(value)
        if problem:
            raise ConfigError(f"{where}: {name} = {shown(value)}{problem}")
    elif type(value) is not type(value_of(config, name)) or value in (math.inf, -math.inf):
        raise ConfigError(
            f"{where}: {name} = {shown(value)}; it must be of the type of "
            f"{shown(value_of(config, name))}"
        )
    reason = _refusal(name)
    if reason:
        raise ConfigError(f"{where}: {name} can be no axis: {reason}")


def _refusal(name: str) -> str:
    """Why a setting can't be an axis; empty if it can."""
    if name == "seed":
        return "give the seeds of the trainings by config.ablate.seeds"
    if group(name) in _UNPAIRED or name == "ablate.split":
        return "cells with other data are not paired; make a study of each"
    if name.startswith("ablate.") and name != "ablate.num_timesteps":
        return "it belongs to the study as a whole"
    return ""


def _cell(config: ConfigDict, axes: Axes, key: Key) -> ConfigDict:
    """The config of a cell. It has no axes: its work directory is like that of any run."""
    settings = {}
    for values, name in zip(axes.values(), key, strict=True):
        settings |= values[name]
    if "schedule.num_timesteps" in settings:
        settings.setdefault("ablate.num_timesteps", 0)
    cell = ConfigDict(config.to_dict())
    cell.ablate.update(axes=(), baseline=(), seeds=(0,), cell=0)
    try:
        cell.update_from_flattened_dict(settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.ablate.axes, cell ({named(key)}): {error}") from error
    return cell.lock()
