"""The compiled conditionals of a code: one program each, on padded batches of one shape.

An encoder and its decoder need results that agree to the last bit. Both therefore run the same
program on the same shapes, with deterministic operations, and `fingerprint` names everything else
that the bits depend on.
"""

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from diffusion.coding import Conditionals, conditionals
from diffusion.schedules import Levels
from experiments.harness import devices
from experiments.harness.setup.definition import ModelDefinition
from experiments.harness.setup.trained import Run
from experiments.harness.workdir.provenance import fingerprint

_NETWORK = ("reverse", "pixels")  # the conditionals that call the network
# Autotuning chooses among algorithms by their time, which differs from process to process.
_GPU_OPTIONS = {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0}


class Programs:
    """The conditionals of a model with its parameters.

    Attributes:
      conditionals: compiled at their first call; they take and return host arrays [m, …] with
        m ≤ `batch_size`.
      labels: the labels of the present batch, if the model is given any.
      bar: counts network evaluations, if there is one.
      seconds: time spent in the network, in q, in transfers and in compilation.
    """

    def __init__(self, definition: ModelDefinition, params: Any, levels: Levels, batch_size: int):
        self._definition, self._batch_size = definition, batch_size
        mesh = devices.mesh()
        self._whole, self._split = devices.replicated(mesh), devices.split_batch(mesh)
        self._params = devices.place(params, self._whole)
        self._levels = Levels(np.float32(levels.log_snr), np.float32(levels.gap))
        self.labels: np.ndarray | None = None
        self.bar: tqdm | None = None
        self.seconds = dict.fromkeys(("network", "q", "transfers", "compilation"), 0.0)
        self.conditionals: Conditionals = conditionals(
            definition.quantization, functools.partial(_Program, self)
        )

    def text_fingerprint(self) -> str:
        """The fingerprint of the programs that call the network; traces them, compiles nothing."""
        x = np.zeros((self._batch_size, *self._definition.image_shape), np.float32)
        lowered = (
            self.conditionals.reverse.lower(x, np.int32(2)),
            self.conditionals.pixels.lower(x),
        )
        return fingerprint(*(program.as_text() for program in lowered))

    def lower(self, function: Callable, *arrays: Any) -> Any:
        """A function (model, *arrays), traced for these arrays."""

        def call(params, levels, labels, *arrays):
            model = self._definition.model(params, labels)
            return function(model._replace(levels=levels), *arrays)

        shardings = [self._split if np.ndim(array) else self._whole for array in arrays]
        jitted = jax.jit(
            call,
            in_shardings=(self._whole, self._whole, self._split, *shardings),
            out_shardings=self._split,
        )
        with jax.default_matmul_precision("highest"):
            return jitted.lower(self._params, self._levels, self._padded_labels(), *arrays)

    def run(self, compiled: Any, kind: str, *arrays: Any) -> Any:
        """A compiled function of arrays [m, …], which are padded; the time is counted."""
        rows = len(arrays[0])
        start = time.perf_counter()
        result = compiled(
            self._params, self._levels, self._padded_labels(), *map(self.padded, arrays)
        )
        jax.block_until_ready(result)
        middle = time.perf_counter()
        host = jax.tree.map(lambda a: np.asarray(a)[:rows], result)
        self.seconds[kind] += middle - start
        self.seconds["transfers"] += time.perf_counter() - middle
        if kind == "network" and self.bar is not None:
            self.bar.update(rows)
        return host

    def padded(self, array: Any) -> Any:
        """An array with rows of zeros up to the batch size; a number as it is."""
        if np.ndim(array) == 0:
            return np.int32(array)
        rows = self._batch_size - len(array)
        return np.pad(array, ((0, rows),) + ((0, 0),) * (array.ndim - 1))

    def _padded_labels(self) -> Int[np.ndarray, "b"] | None:
        return None if self.labels is None else self.padded(np.asarray(self.labels, np.int32))


class _Program:
    """The conditional of this name."""

    def __init__(self, programs: Programs, name: str, function: Callable):
        self._programs, self._function, self._compiled = programs, function, None
        self._kind = "network" if name in _NETWORK else "q"

    def lower(self, *arrays: Any) -> Any:
        return self._programs.lower(self._function, *arrays)

    def __call__(self, *arrays: Any) -> Any:
        if self._compiled is None:
            start = time.perf_counter()
            options = _GPU_OPTIONS if jax.default_backend() == "gpu" else None
            lowered = self.lower(*map(self._programs.padded, arrays))
            self._compiled = lowered.compile(compiler_options=options)
            self._programs.seconds["compilation"] += time.perf_counter() - start
        return self._programs.run(self._compiled, self._kind, *arrays)


def environment(run: Run) -> dict[str, str]:
    """What the bits depend on beside the code: versions, devices and weights."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(run.params)]
    return {
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "constriction")},
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "processor": _processor(),
        "threads": str(_num_threads()),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "weights": f"{fingerprint(*leaves)} of step {run.step}",
    }


@functools.cache
def _processor() -> str:
    """A fingerprint of the processor's features, which decide how XLA compiles for it."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = path.read_text().splitlines()
    features = sorted({line for line in lines if line.startswith(("model name", "flags", "Feat"))})
    return fingerprint(features)


def _num_threads() -> int:
    """The number of threads that XLA uses on a CPU."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
