"""What tests of runs that come to grief share.

A pytest plugin, as `tiny` is. (PYTEST_DONT_REWRITE)
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.objectives import OBJECTIVES, Objective, vlb
from experiments.harness.data import order, splits
from experiments.harness.workdir.checkpoints import Checkpoints
from experiments.train import train
from tests.experiments import tiny


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, quick_compiles):
    """Twelve steps of the convolution: config, work directory, final state."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return tiny.config(), workdir, train(tiny.config(), workdir)


def assert_ends_as(uninterrupted, workdir):
    """Goes on with the run, and compares all that it leaves with the one that nothing stopped."""
    config, whole, expected = uninterrupted
    tiny.assert_bit_equal(train(config, workdir), expected)
    assert tiny.metrics(workdir) == tiny.metrics(whole)
    assert tiny.saved_steps(workdir) == tiny.saved_steps(whole)
    assert tiny.best_step(workdir) == tiny.best_step(whole)
    names = {"checkpoints", "config.json", "data.json", "metrics.jsonl", "samples"}
    names |= {"damaged_checkpoints", "parts.json", "sessions.jsonl"}
    assert {p.name for p in workdir.iterdir() if "tfevents" not in p.name} <= names


def bad_batches(monkeypatch, config, *steps):
    """An objective that is infinite in the batches of these steps."""
    images = splits.load_data(config, "train").images
    size = config.train.batch_size
    first = [order.batch_indices(0, step - 1, len(images), size)[0] for step in steps]
    marks = jnp.asarray(np.stack([images[i] for i in first]) / 8.0 - 1, jnp.float32)

    def objective(model, x_0, *rest):
        loss = vlb().discrete(model, x_0, *rest)
        bad = (x_0[0] == marks).all(axis=(1, 2, 3)).any()
        return loss._replace(term=jnp.where(bad, jnp.inf, loss.term))

    monkeypatch.setitem(OBJECTIVES, "vlb", lambda: Objective(objective, None))


PROGRAM = """
import os, signal, sys, time
from experiments.harness import command_line
from experiments.harness.data import order
from tests.experiments import tiny
workdir = sys.argv[1]
{before}
status = command_line.run("train", tiny.config(), workdir)
print("left behind")
sys.exit(status)
"""
AT_STEP = """
def do():
    {do}
order.batch_indices = tiny.Interruption({step}, order.batch_indices, do)
"""


def program(before, workdir, environment, **variables):
    """The trainer in a process of its own, after a few lines of preparation."""
    command = [sys.executable, "-c", PROGRAM.format(before=before), str(workdir)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, **variables
    )


def last_line(text):
    return text.replace("\r", "\n").strip().splitlines()[-1]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A work directory with three checkpoints, ever better, and the last one's state."""
    workdir = tmp_path_factory.mktemp("three")
    # Large enough to lie in files of their own, beside small ones.
    states = {
        step: {"ema_params": {"w": jax.random.normal(jax.random.key(step), (64, 64))}, "n": step}
        for step in (1, 2, 3)
    }
    states = {step: jax.tree.map(jnp.asarray, state) for step, state in states.items()}
    with Checkpoints(workdir) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, 5.0 - step)
    return workdir, states


def files_of(checkpoint):
    return sorted(p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file())
