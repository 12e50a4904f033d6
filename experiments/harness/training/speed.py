"""How fast a run is, and what its device could do: numbers for the log, and traces."""

from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

# Floating-point operations a second of one device, dense, in bfloat16 and as float32 products are
# computed by default: in TensorFloat-32 on a GPU, in bfloat16 on a TPU. The first that a device's
# kind begins with.
PEAK_FLOPS = {
    # NVIDIA's data sheets: A100 (2021), H100 (2022, the figures without sparsity), H200 (2024).
    "NVIDIA A100": (312e12, 156e12),
    "NVIDIA H100 PCIe": (756e12, 378e12),
    "NVIDIA H100 NVL": (835e12, 417.5e12),
    "NVIDIA H100": (989.4e12, 494.7e12),
    "NVIDIA H200 NVL": (835e12, 417.5e12),
    "NVIDIA H200": (989.4e12, 494.7e12),
    # cloud.google.com/tpu/docs: system architecture of each version, per chip. A device is a core
    # in v3, and a chip from v4 on.
    "TPU v3": (61.5e12, 61.5e12),
    "TPU v4": (275e12, 275e12),
    "TPU v5 lite": (197e12, 197e12),
    "TPU v5e": (197e12, 197e12),
    "TPU v5p": (459e12, 459e12),
    "TPU v5": (459e12, 459e12),
    "TPU v6": (918e12, 918e12),
}


# What a line of the log says that depends on the machine and its clock.
TIMING = (
    "images_per_second",
    "step_seconds",
    "data_wait",
    "flops_per_second",
    "flop_utilization",
    "peak_memory_bytes",
    "compile_seconds",
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """A device's floating-point operations a second at most; None where that is not known.

    Args:
      device_kind: as `jax.Device.device_kind`.
      dtype: "bfloat16" or "float32".
    """
    for kind, (bfloat16, float32) in PEAK_FLOPS.items():
        if device_kind.startswith(kind):
            return bfloat16 if dtype == "bfloat16" else float32
    return None


class Timing(NamedTuple):
    """Totals of a run since its first step, which is left out.

    Attributes:
      steps: number of training steps.
      seconds: seconds that they took, waiting for data included.
      waited: seconds of them in which the loop waited for data.
      compile_seconds: seconds that compilation took; None before it.
      flops: floating-point operations of a step, over all devices; None if unknown.
    """

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    compile_seconds: float | None = None
    flops: float | None = None


def count_flops(compiled: jax.stages.Compiled, config: ConfigDict) -> float | None:
    """Floating-point operations of a step, over all devices, as the compiler counts them.

    The count of a program with rematerialisation includes recomputation, that of a loop has its
    body once, and that of a GPU's program leaves out library calls, which do nearly all the work:
    there it is None, since it would not be the model's.

    Args:
      compiled: the compiled training step; a loop over several steps counts as one of them.
      config: the config.
    """
    is_counted = not config.model.remat and config.train.accumulate == 1
    if not is_counted or jax.default_backend() == "gpu":
        return None
    costs = compiled.cost_analysis() or {}
    # One device's share of the program.
    return costs["flops"] * jax.device_count() if costs.get("flops", 0) > 0 else None


def peak_memory() -> int | None:
    """The most bytes that a device of this process has had in use; None where none says."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    found = [of["peak_bytes_in_use"] for of in stats if of and "peak_bytes_in_use" in of]
    return max(found, default=None)


def speed_values(
    timing: Timing, last: Timing, batch_size: int, peak: float | None
) -> dict[str, float]:
    """The speed of the steps between two timings.

    Args:
      timing: the totals now.
      last: the totals before the steps.
      batch_size: examples of a step, over all devices.
      peak: floating-point operations a second that all devices can do; None if unknown.

    Returns:
      `images_per_second`, `step_seconds`, `data_wait` (the share of the time spent waiting for
      data), and those of `flops_per_second`, `flop_utilization` and `peak_memory_bytes` that are
      known; empty without steps.
    """
    steps, seconds = timing.steps - last.steps, timing.seconds - last.seconds
    if not steps or not seconds:
        return {}
    rate = steps / seconds
    values = {
        "images_per_second": rate * batch_size,
        "step_seconds": 1 / rate,
        "data_wait": (timing.waited - last.waited) / seconds,
    }
    if timing.flops is not None:
        values["flops_per_second"] = rate * timing.flops
        if peak is not None:
            values["flop_utilization"] = rate * timing.flops / peak
    memory = peak_memory()
    return values if memory is None else values | {"peak_memory_bytes": memory}


def speed_text(values: dict[str, float]) -> str:
    """The part of `speed_values` that the progress bar shows."""
    if not values:
        return ""
    waiting = values["data_wait"]
    waiting_text = f", {waiting:.0%} waiting for data" if waiting > 0.05 else ""
    return f", {values['images_per_second']:.0f} images/s{waiting_text}"


class Profile:
    """A trace of chosen training steps, in `profile/` of the work directory.

    They are counted from where the run begins or goes on, so that either may be looked at.

        with Profile(config, workdir) as profile:
            for step in ...:
                profile.before(step, state)
                state = train_step(state, ...)

    For TensorBoard's profile plugin, or ui.perfetto.dev.
    """

    def __init__(self, config: ConfigDict, workdir: epath.PathLike):
        self._first = config.profile.first_step
        self._last = self._first + config.profile.num_steps
        self._directory = str(epath.Path(workdir) / "profile")
        self._is_on, self._is_over = False, not config.profile.num_steps

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_on:
            self._stop()
        elif not self._is_over:
            tqdm.write(
                f"no step was traced: the run took less than config.profile.first_step = "
                f"{self._first} of them"
            )

    def before(self, step: int, state: Any) -> None:
        """Starts or ends the trace where it is time to; then it waits for the steps under way.

        Args:
          step: 0-based number of the step to come; may leave some out, as where several are
            dispatched at once.
          state: what the step before it returned.
        """
        if self._is_on and step >= self._last:
            jax.block_until_ready(state)
            self._stop()
        elif not self._is_on and not self._is_over and step >= self._first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._is_on = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._is_on, self._is_over = False, True
        tqdm.write(f"a trace of the steps is in {self._directory}")
