"""How fast a run is, and what its device could do: numbers for the log, and traces."""

import time
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.harness import checks

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


def flops(program: jax.stages.Lowered) -> float | None:
    """Floating-point operations of a program, over all devices, by the compiler's own count.

    None where it has none: most accelerators count compiled programs alone, and those without what
    they call of libraries, which is nearly all. What a loop repeats is counted once.
    """
    costs = program.cost_analysis()
    return float(costs["flops"]) if costs and costs.get("flops", 0) > 0 else None


def peak_memory() -> int | None:
    """The most bytes that a device of this process has had in use; None where none says."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    found = [of["peak_bytes_in_use"] for of in stats if of and "peak_bytes_in_use" in of]
    return max(found, default=None)


def check(config: ConfigDict) -> None:
    """Raises ConfigError for a profile of negative steps."""
    for name in ("first_step", "num_steps"):
        checks.check_setting(config, f"profile.{name}", lambda n: n >= 0, "it can't be negative")


class Speed:
    """What a line of the log says of the steps since the last one.

    Attributes:
      batch_size: examples of a step, over all devices.
      flops: floating-point operations of a step, over all devices; None if not known.
      peak: of all devices together, a second; None if not known.
    """

    def __init__(self, batch_size: int, flops: float | None = None, peak: float | None = None):
        self.batch_size, self.flops, self.peak = batch_size, flops, peak

    @classmethod
    def of(cls, config: ConfigDict, flops: float | None) -> "Speed":
        """Of a training run, on the devices that there are."""
        each = peak_flops(jax.devices()[0].device_kind, config.model.dtype)
        peak = None if each is None else each * jax.device_count()
        return cls(config.train.batch_size, flops, peak)

    def values(self, steps: int, seconds: float, waited: float) -> dict[str, float]:
        """Numbers by name: `images_per_second`, `step_seconds`, `data_wait` and what is known of
        `flops_per_second`, `flop_utilization` and `peak_memory_bytes`.

        Args:
          steps: how many steps.
          seconds: that they took, the waiting included.
          waited: seconds of them in which the loop waited for data; `data_wait` is their share.
        """
        if not steps or not seconds:
            return {}
        rate = steps / seconds
        found = {
            "images_per_second": rate * self.batch_size,
            "step_seconds": 1 / rate,
            "data_wait": waited / seconds,
        }
        if self.flops is not None:
            found["flops_per_second"] = rate * self.flops
            if self.peak is not None:
                found["flop_utilization"] = rate * self.flops / self.peak
        memory = peak_memory()
        return found if memory is None else found | {"peak_memory_bytes": memory}

    @staticmethod
    def line(values: dict[str, float]) -> str:
        """What a progress bar shows of these."""
        if not values:
            return ""
        waiting = values["data_wait"]
        told = f", {waiting:.0%} waiting for data" if waiting > 0.05 else ""
        return f", {values['images_per_second']:.0f} images/s{told}"


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


class Compiled:
    """A program compiled ahead of its first call.

    Attributes:
      seconds: what lowering and compiling took.
      flops: of a call, over all devices, as `flops` counts them.
      call: runs it.
    """

    def __init__(self, jitted: Any, *args: Any):
        """Compiles for arguments of these shapes; runs nothing."""
        began = time.monotonic()
        lowered = jitted.lower(*args)
        self.call = lowered.compile()
        self.seconds = time.monotonic() - began
        self.flops = flops(lowered)
