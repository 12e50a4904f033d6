"""Programs on disk: used again, and compiled anew with one warning where they cannot be used."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments.harness.processes import compilation

ROOT = pathlib.Path(__file__).parents[4]
# Compiles two programs and prints how many came from the disk.
SCRIPT = """
import jax
from experiments.harness.processes import compilation
compilation.MIN_SECONDS = 0
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))
compilation.keep_programs()
for factor in (2, 3):
    jax.jit(lambda x: factor * x)(jax.numpy.ones(3))
print(sum(hits))
"""


@pytest.fixture
def run(tmp_path):
    """Runs the script in a process of its own: (programs from the disk, lines of warnings)."""

    def run(**variables):
        unset = "JAX_COMPILATION_CACHE_DIR"
        environment = {name: value for name, value in os.environ.items() if name != unset}
        environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)} | variables
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        return int(ended.stdout), ended.stderr.splitlines()

    return run


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return compilation.cache_directory()


def test_programs_are_used_again_and_damaged_ones_removed_with_one_warning(run, directory):
    assert run() == (0, [])
    hits, _ = run()
    assert hits >= 2
    for program in directory.glob("*-cache"):
        program.write_bytes(program.read_bytes()[:20])
    hits, (warning,) = run()
    assert hits == 0
    assert f"{directory} could not be read or written and is emptied" in warning
    hits, warnings = run()
    assert hits >= 2
    assert not warnings


def test_a_directory_that_cannot_be_made_gives_one_warning(run, directory):
    directory.parent.mkdir(parents=True)
    directory.touch()
    hits, (warning,) = run()
    assert hits == 0
    assert "cannot be kept" in warning
    assert str(directory) in warning


def test_jaxs_own_settings_go_first(run, directory, tmp_path):
    assert run(JAX_ENABLE_COMPILATION_CACHE="false") == (0, [])
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == (0, [])
    assert not directory.exists()
