"""Checks of single settings: each error names the setting, its value and what would be right."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.harness.errors import ConfigError


def pick(registry: Mapping[str, Any] | Sequence[str], name: str, setting: str) -> Any:
    """The entry of a registry, or an error that lists the known names and the likely one."""
    if name in registry:
        return registry[name] if isinstance(registry, Mapping) else name
    close = difflib.get_close_matches(str(name), registry, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{setting} = {name!r} is unknown; known: {', '.join(registry)}{hint}")


def check_positive(config: ConfigDict, *names: str) -> None:
    """Raises ConfigError unless each of these settings is at least 1."""
    for name in names:
        check_setting(config, name, lambda value: value >= 1, "it must be at least 1")


def value_of(config: ConfigDict, name: str) -> Any:
    """The value of a setting, such as "train.beta2"."""
    for part in name.split("."):
        config = config[part]
    return config


def check_setting(
    config: ConfigDict, name: str, is_right: Callable[[Any], bool], remedy: str
) -> None:
    """Raises ConfigError with the remedy unless the setting, such as "train.beta2", is right."""
    value = value_of(config, name)
    if not is_right(value):
        raise ConfigError(f"config.{name} = {value}; {remedy}")
