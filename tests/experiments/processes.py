"""Training steps on several devices, which `test_distributed` runs in processes of their own.

    python -m tests.experiments.processes OUT.npz CASES [COORDINATOR NUM_PROCESSES PROCESS_ID]
    python -m tests.experiments.processes resume WORKDIR FSDP NUM_STEPS
    python -m tests.experiments.processes job WORKDIR WHAT COORDINATOR NUM_PROCESSES PROCESS_ID

A case is the batch's way to the devices (held or streamed) and the size of the axis `fsdp`.
"""

import functools
import itertools
import signal
import sys
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.harness import command_line, devices, seeds
from experiments.harness.data import feed, order, splits
from experiments.harness.errors import ConfigError
from experiments.harness.processes import distributed
from experiments.harness.setup.definition import MODELS
from experiments.harness.setup.params import init_params
from experiments.harness.training.gradients import make_gradients
from experiments.harness.training.state import (
    TrainState,
    abstract_state,
    init_state,
    make_setup,
    state_shardings,
)
from experiments.harness.training.step import make_train_step
from experiments.harness.workdir.checkpoints import Checkpoints
from tests.experiments import tiny

NUM_STEPS = 50


class Dense(nn.Module):
    """Two layers over all pixels, with dropout, whose gain depends on the noise level."""

    out_channels: int

    def validate(self, image_shape):
        del image_shape

    @nn.compact
    def __call__(self, x_t, log_snr, condition=None, *, train=False):
        gain = 1 + nn.Dense(1, name="gain")(0.1 * log_snr[:, None])
        y = nn.tanh(nn.Dense(64, name="in")(x_t.reshape(len(x_t), -1)) * gain)
        y = nn.Dropout(0.1, deterministic=not train)(y)
        pixels = x_t.shape[1:-1]
        y = nn.Dense(np.prod(pixels) * self.out_channels, name="out")(y)
        return y.reshape(len(x_t), *pixels, self.out_channels)


MODELS["dense"] = lambda config, schedule, out, classes: Dense(out)


def config(**overrides: Any) -> ConfigDict:
    return tiny.config(
        "dense", **{"train__log_every": 1, "train__num_steps": NUM_STEPS} | overrides
    )


class Training:
    """Steps of a config on a mesh."""

    def __init__(self, config: ConfigDict, mesh: Mesh, streamed: bool = False, dtype: Any = None):
        self.config, self.mesh, self.streamed = config, mesh, streamed
        self.setup = make_setup(config)._replace(mesh=mesh)
        self.dataset = splits.load_data(config, "train")
        params = init_params(self.setup.definition, config.seed)
        params = jax.tree.map(lambda a: np.asarray(a, dtype), params)
        self.shardings = state_shardings(self.setup)
        self.state = devices.place(init_state(params, self.setup.optimizer), self.shardings)
        self.compiled = make_train_step(self.setup, streamed)

    def batch(self, step: int) -> tuple[splits.Examples, Any]:
        """What the step after so many, or several steps, are given beside the state."""
        several = self.config.train.steps_per_dispatch
        size = self.config.train.batch_size
        indices = np.stack(
            [
                order.batch_indices(self.config.seed, step + i, len(self.dataset.images), size)
                for i in range(several)
            ]
        )
        leading = int(several > 1)
        indices = indices if leading else indices[0]
        if self.streamed:
            mine = indices[..., devices.local_part(size)]
            examples = jax.tree.map(lambda of: of[mine], self.dataset.examples(slice(None)))
            return devices.join_batch(examples, self.mesh, leading), None
        examples = devices.place(self.dataset.examples(slice(None)), devices.replicated(self.mesh))
        return examples, devices.place(indices, devices.split_batch(self.mesh, leading))

    def step(self) -> TrainState:
        packing, batch = self.compiled.packing, self.batch(int(self.state.step))
        packed = packing.pack(self.state)
        assert (packed is self.state) == (self.mesh.size > 1)
        self.state = packing.unpack(self.compiled(packed, *batch))
        return self.state

    def gradients(self) -> Any:
        """Of the step to come, on the host."""
        compute = jax.jit(make_gradients(self.setup))
        root = seeds.root(self.config.seed)
        return devices.gather(compute(root, self.state, *self.batch(int(self.state.step)))[1])


def measured(streamed: bool, mesh: Mesh, numbers: dict[str, np.ndarray], name: str) -> None:
    """Adds a case's first images and gradients in float32, and its losses in float64."""
    training = Training(config(), mesh, streamed)
    examples, indices = training.batch(0)
    images = examples.images if streamed else jax.jit(lambda a, i: a[i])(examples.images, indices)
    numbers[f"{name}/images"] = devices.gather(images)
    for path, leaf in jax.tree_util.tree_flatten_with_path(training.gradients())[0]:
        numbers[f"{name}/gradient{jax.tree_util.keystr(path)}"] = leaf
    with jax.enable_x64(True):
        training = Training(config(), mesh, streamed, np.float64)
        losses = [np.asarray(training.step().window.loss) for _ in range(NUM_STEPS)]
        numbers[f"{name}/losses"] = np.array(losses)
        assert numbers[f"{name}/losses"].dtype == np.float64
        split = [a.sharding.spec for a in jax.tree.leaves(training.state.opt_state)]
        assert any("fsdp" in spec for spec in split) == (mesh.shape["fsdp"] > 1)


def main(out: str, cases: str, *processes: str) -> None:
    """Measures the cases, and writes the numbers."""
    if processes:
        coordinator, num_processes, process_id = processes
        distributed.initialize(coordinator, int(num_processes), int(process_id))
    numbers: dict[str, np.ndarray] = {}
    for case in cases.split(","):
        kind, fsdp = case.split("_")
        mesh = devices.mesh(config(devices__fsdp=int(fsdp)))
        measured(kind == "streamed", mesh, numbers, case)
    if not processes:
        one = Mesh(devices.mesh().devices[:1], devices.AXES)
        measured(False, one, numbers, "one")
    if distributed.is_first():
        np.savez(out, **numbers)
    distributed.wait_for_all("written")


def resume(workdir: str, fsdp: int, num_steps: int) -> TrainState:
    """Goes on from the checkpoint of a work directory for so many steps; saves and returns it."""
    changed = config(devices__fsdp=fsdp)
    training = Training(changed, devices.mesh(changed))
    with Checkpoints(workdir) as checkpoints:
        latest = checkpoints.latest_step()
        if latest is not None:
            like = abstract_state(training.setup)
            training.state = checkpoints.restore(latest, like)
        for _ in range(num_steps):
            training.step()
        checkpoints.save(int(training.state.step), training.state)
    return jax.block_until_ready(training.state)


def job(workdir: str, what: str, *processes: str) -> int:
    """The main job with a streamed set, as `main.py` runs it; its exit status.

    The second process gets a SIGTERM before the sixth batch, or the first can't read the set.
    """
    coordinator, num_processes, process_id = processes

    def join():
        distributed.initialize(coordinator, int(num_processes), int(process_id))

    def fail(*_):
        raise ConfigError("a.png cannot be read")

    if process_id == "0" and what == "fail":
        feed.Feed.__init__ = fail
    if process_id == "1" and what == "stop":
        raise_signal = functools.partial(signal.raise_signal, signal.SIGTERM)
        feed.Feed.next = _before(feed.Feed.next, 5, raise_signal)
    return command_line.run("all", job_config(), workdir, (), join)


def job_config() -> ConfigDict:
    """Parameters in two parts each, batches streamed by a thread."""
    return config(train__num_steps=8, devices__fsdp=2, data__stream="always", data__workers=0)


def _before(method: Any, call: int, do: Any) -> Any:
    """The method, with something done before so many calls have been made."""
    calls = itertools.count()

    def wrapped(*args):
        if next(calls) == call:
            do()
        return method(*args)

    return wrapped


if __name__ == "__main__":
    if sys.argv[1] == "resume":
        resume(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1] == "job":
        sys.exit(job(*sys.argv[2:]))
    else:
        main(*sys.argv[1:])
