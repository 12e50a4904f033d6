"""The config that a work directory was trained with: --config=configs/recorded.py:runs/digits.

What `main.py` uses where a work directory holds a run and no config is named.
"""

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from configs import base


def get_config(workdir: str) -> ConfigDict:
    """The settings in the work directory's config.json, over the defaults.

    Raises:
      ValueError: if there is no such file, or it is damaged.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise ValueError(f"--config=configs/recorded.py:{workdir}: {path} does not exist")
    try:
        settings = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no JSON object")
    try:
        return from_json(settings)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error}") from error


def from_json(settings: dict[str, Any]) -> ConfigDict:
    """The settings of a JSON file, nested, over the defaults."""
    config = base.get_config()
    with config.unlocked():  # a part that a notebook registered has a group of its own
        config.update(_with_tuples(settings))
    return config


def _with_tuples(value: Any) -> Any:
    """JSON has lists where a config has tuples."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
