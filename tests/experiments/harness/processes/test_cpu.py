"""The devices that main.py makes of a CPU."""

import os
import subprocess
import sys

import pytest

_PROGRAM = """
import jax
from ml_collections import ConfigDict
from experiments.harness.processes import cpu
cpu.divide(ConfigDict({"devices": {"cpu": %r}}))
print(jax.device_count())
"""


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        (2, {}, 2),
        (1, {}, 1),
        (2, {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        (2, {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4),
        (-1, {}, 1),  # the check of the config refuses it
        (10**9, {}, 1),
    ],
)
def test_the_setting_counts_unless_the_environment_says_otherwise(setting, environment, expected):
    cleared = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    output = subprocess.run(
        [sys.executable, "-c", _PROGRAM % setting],
        env=os.environ | cleared | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.split()[-1] == str(expected)
