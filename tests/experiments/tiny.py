"""Runs small enough for tests: digits, T = 8, a dozen steps, and two networks to choose from.

`unet` is the real one at its smallest. `convolution` compiles in a second; where a test is about
the harness and not about the network, it runs that one. Both are trained hard enough, at a
learning rate of a few per cent, that two steps never look alike.

A pytest plugin too: `pytest_plugins = ["tests.experiments.tiny"]` in a module gives it the fixtures
at the end. (PYTEST_DONT_REWRITE: such a module has imported this one already.)
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits
from experiments import all as main_job
from experiments.harness.errors import ConfigError
from experiments.harness.setup.definition import MODELS, define_model
from experiments.harness.setup.params import init_params
from experiments.harness.training import speed
from experiments.harness.training.optimizer import make_optimizer
from experiments.harness.training.state import TrainState, init_state
from experiments.harness.workdir.checkpoints import Checkpoints


class Convolution(nn.Module):
    """A convolution whose gain depends on the noise level, with dropout. No zero initialisers.

    With classes the gain depends on the label too; no label is the last of num_classes + 1.
    """

    out_channels: int
    num_classes: int = 0
    dropout: float = 0.1

    def validate(self, image_shape):
        del image_shape

    @nn.compact
    def __call__(self, x_t, log_snr, condition=None, *, train=False):
        gain = 1 + nn.Dense(self.out_channels, name="gain")(0.1 * log_snr[:, None])
        if self.num_classes:
            none = np.full(len(x_t), self.num_classes)
            label = none if condition is None else condition
            gain += nn.Embed(self.num_classes + 1, self.out_channels, name="label")(label)
        y = nn.Conv(self.out_channels, (3, 3), name="conv")(x_t) * gain[:, None, None]
        return nn.Dropout(self.dropout, deterministic=not train)(y)


# One line in the registry is all that a new network takes.
MODELS["convolution"] = lambda config, schedule, out, classes: Convolution(out, classes)


def config(network: str = "convolution", **overrides: Any) -> ConfigDict:
    """The digits config at its smallest; `train__num_steps=6` sets `train.num_steps`.

    Twelve steps, a line of the log every 2, a checkpoint every 4, samples every 6.
    """
    tiny = digits.get_config()
    if network not in tiny.model:
        with tiny.unlocked():
            tiny.model[network] = {}
    tiny.schedule.num_timesteps = 8
    tiny.model.name = network
    tiny.model.unet.update(channels=8, num_groups=4)
    tiny.train.update(
        batch_size=16,
        accumulate=1,
        num_steps=12,
        learning_rate=0.02,
        warmup_steps=min(3, overrides.get("train__num_steps", 3)),
        ema_decay=0.8,
        log_every=2,
        checkpoint_every=4,
        sample_every=6,
        sample_timesteps=3,
        validation_timesteps=2,
    )
    tiny.evaluate.update(batch_size=64, chunk_size=4, replicates=3, target=0.0)
    tiny.sample.update(num_samples=6, batch_size=4, strip_rows=2, strip_columns=4)
    tiny.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return tiny


def state_of(config: ConfigDict, scale: float = 0.0, seed: int = 0) -> TrainState:
    """The state of step 0 on the host, its EMA weights moved by normal noise of this scale."""
    definition = define_model(config)
    state = init_state(init_params(definition, config.seed), make_optimizer(config))
    rng = np.random.default_rng(seed)
    ema_params = jax.tree.map(
        lambda a: np.float32(a + scale * rng.standard_normal(a.shape)), state.ema_params
    )
    return state._replace(ema_params=ema_params)


def save(workdir: pathlib.Path, states: dict[int, tuple[TrainState, float | None]]) -> None:
    """Makes a work directory that holds states at steps, each with its validation metric."""
    with Checkpoints(workdir) as checkpoints:
        for step, (state, validation) in states.items():
            checkpoints.save(step, state, validation)


def untrained(
    workdir: pathlib.Path, config: ConfigDict, scale: float = 1.0, step: int = 1
) -> pathlib.Path:
    """Makes a work directory that holds a network of random weights: `state_of`, at a step."""
    save(workdir, {step: (state_of(config, scale), None)})
    return workdir


def restore(config: ConfigDict, workdir: pathlib.Path, step: int | None = None) -> TrainState:
    """A saved state, the latest by default."""
    like = jax.eval_shape(
        lambda: init_state(init_params(define_model(config), 0), make_optimizer(config))
    )
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore(step or checkpoints.latest_step(), like)


def saved_steps(workdir: pathlib.Path) -> list[int]:
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.steps()


def best_step(workdir: pathlib.Path) -> int:
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.best_step()


def copy(workdir: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    """A work directory to change, times of writing included."""
    return pathlib.Path(shutil.copytree(workdir, directory / "copy"))


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the numbers that depend on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in speed.TIMING} for line in lines]


def assert_bit_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    paths = jax.tree_util.tree_flatten_with_path(expected)[0]
    for a, (path, e) in zip(jax.tree.leaves(actual), paths, strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype), jax.tree_util.keystr(path)
        assert a.tobytes() == e.tobytes(), jax.tree_util.keystr(path)


@contextlib.contextmanager
def refused(*parts: Any, match: str | None = None) -> Iterator[pytest.ExceptionInfo]:
    """The body raises a ConfigError of one line that has these parts and matches a pattern."""
    with pytest.raises(ConfigError, match=match) as error:
        yield error
    message = str(error.value)
    assert "\n" not in message
    assert all(str(part) in message for part in parts), (parts, message)


def files(directory: pathlib.Path) -> dict[pathlib.Path, Any]:
    """Every path beneath a directory with its content, and when it was written."""
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(directory.rglob("*"))
    }


@dataclasses.dataclass
class Interruption:
    """Stands in for `order.batch_indices`, and interrupts before the given step's batch is made."""

    step: int
    batch_indices: Callable
    interrupt: Callable[[], Any]

    def __call__(self, seed, step, *sizes):
        if step == self.step:
            self.interrupt()
        return self.batch_indices(seed, step, *sizes)


class Finished(NamedTuple):
    """A finished run of the main job.

    Attributes:
      config: its config.
      workdir: its work directory. Shared: look, and copy it before changing anything.
      output: what the job printed.
    """

    config: ConfigDict
    workdir: pathlib.Path
    output: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_compiles) -> Finished:
    """The main job with the U-Net, run from beginning to end by whichever process comes first."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    workdir, output = shared / "finished", shared / "finished.txt"
    with (shared / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                main_job.run(config("unet"), workdir)
            output.write_text(printed.getvalue())
    return Finished(config("unet"), workdir, output.read_text())
