"""The speed of a run, beside the peak of its device; and traces for a profiler."""

import math
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

# A device's peak floating-point operations a second for dense products of bfloat16, and of float32
# at the default precision, which is TensorFloat-32 on a GPU and bfloat16 on a TPU. The first name
# that the device's kind starts with applies.
PEAK_FLOPS = {
    # NVIDIA's data sheets: A100 (2021), H100 (2022, the figures without sparsity), H200 (2024).
    "NVIDIA A100": (312e12, 156e12),
    "NVIDIA H100 PCIe": (756e12, 378e12),
    "NVIDIA H100 NVL": (835e12, 417.5e12),
    "NVIDIA H100": (989.4e12, 494.7e12),
    "NVIDIA H200 NVL": (835e12, 417.5e12),
    "NVIDIA H200": (989.4e12, 494.7e12),
    # cloud.google.com/tpu/docs, system architecture of each version, per chip. In v3 a device is a
    # core, from v4 on a chip.
    "TPU v3": (61.5e12, 61.5e12),
    "TPU v4": (275e12, 275e12),
    "TPU v5 lite": (197e12, 197e12),
    "TPU v5e": (197e12, 197e12),
    "TPU v5p": (459e12, 459e12),
    "TPU v5": (459e12, 459e12),
    "TPU v6": (918e12, 918e12),
}

# The values of a log line that depend on the machine and its clock.
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
    """A device's peak floating-point operations a second; None if unknown.

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


def count_flops(jaxpr: Any) -> float:
    """Floating-point operations of a program's matrix products and convolutions.

    A multiplication and an addition are two. Other operations are left out. A convolution's padding
    counts like its data. With `model.remat` the count includes recomputation. Of a conditional the
    branch with most operations counts: of a convolution with several forms, the direct one.

    Args:
      jaxpr: a `jax.extend.core.Jaxpr` or `ClosedJaxpr`, such as `jax.jit(f).trace(…).jaxpr`.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        settings = equation.params
        if equation.primitive.name == "dot_general":
            (summed_axes, _), _ = settings["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[axis] for axis in summed_axes)
            total += 2 * equation.outvars[0].aval.size * summed
        elif equation.primitive.name == "conv_general_dilated":
            kernel, axes = equation.invars[1].aval, settings["dimension_numbers"].rhs_spec
            # Dilation fills the input with zeros, which need no operations.
            summed = kernel.size / kernel.shape[axes[0]] / math.prod(settings["lhs_dilation"])
            total += 2 * equation.outvars[0].aval.size * summed
        leaves = jax.tree.leaves(list(settings.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        counts = [count_flops(leaf) for leaf in leaves if hasattr(leaf, "eqns")]
        inner = max(counts) if equation.primitive.name == "cond" else sum(counts)
        total += settings.get("length", 1) * inner  # a scan's number of iterations
    return total


def peak_memory() -> int | None:
    """The most bytes in use so far on a device of this process; None if no device says."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in statistics if "peak_bytes_in_use" in each]
    return max(peaks, default=None)


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

    Steps are counted from where the run starts or resumes.

        with Profile(config, workdir) as profile:
            for step in ...:
                profile.before(step, state)
                state = train_step(state, ...)

    TensorBoard's profile plugin and ui.perfetto.dev show the trace.
    """

    def __init__(self, config: ConfigDict, workdir: epath.PathLike):
        self._first = config.profile.first_step
        self._last = self._first + config.profile.num_steps
        self._directory = str(epath.Path(workdir) / "profile")
        self._is_tracing, self._is_finished = False, not config.profile.num_steps

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_tracing:
            self._stop()
        elif not self._is_finished:
            tqdm.write(
                "no step was traced: the run took fewer steps than config.profile.first_step = "
                f"{self._first}"
            )

    def before(self, step: int, state: Any) -> None:
        """Starts or stops the trace before the steps that the config names.

        At a start or stop it waits for the device, so that the trace has the chosen steps only.

        Args:
          step: 0-based number of the next step; numbers are left out if a call takes several steps.
          state: the state that the next step takes.
        """
        if self._is_tracing and step >= self._last:
            jax.block_until_ready(state)
            self._stop()
        elif not self._is_tracing and not self._is_finished and step >= self._first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._is_tracing = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._is_tracing, self._is_finished = False, True
        tqdm.write(f"a trace of the steps is in {self._directory}")
