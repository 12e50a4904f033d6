"""The config that a work directory was trained with: --config=configs/recorded.py:runs/digits.

What `main.py` uses where a work directory holds a run and no config is named.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base
from experiments.harness.workdir import record


def get_config(workdir: str) -> ConfigDict:
    """The settings in the work directory's config.json, over the defaults."""
    config = base.get_config()
    config.update(_tuples(record.recorded_config(workdir)))
    return config


def _tuples(value: Any) -> Any:
    """JSON has lists where a config has tuples."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
