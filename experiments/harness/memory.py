"""Estimates of memory, made before anything is allocated.

Each is a lower bound, the size of the largest arrays alone: what it refuses can't run, and what it
accepts may still need more than there is.
"""

import math
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from configs.settings.declaration import value_of
from experiments.harness.errors import ConfigError

FLOAT, DOUBLE = 4, 8  # bytes
GIBIBYTE = 2**30


class Need(NamedTuple):
    """Memory that a run needs at least.

    Attributes:
      setting: the setting that determines it.
      num_bytes: how much.
      on_device: whether on each device, or else on the host.
    """

    setting: str
    num_bytes: float
    on_device: bool = True


def check_memory(config: ConfigDict, image_shape: tuple[int, ...], *parts: str) -> None:
    """Refuses sizes that can't fit.

    Args:
      config: the config.
      image_shape: (height, width, channels).
      parts: names of experiments, as for `checks.check`.

    Raises:
      ConfigError: with one line that names the setting, its value and the memory.
    """
    limits = {True: device_bytes(), False: host_bytes()}
    for need in needs(config, math.prod(image_shape), jax.device_count(), parts):
        limit = limits[need.on_device]
        if need.num_bytes > limit:
            place = "each device" if need.on_device else "the host"
            raise ConfigError(
                f"config.{need.setting} = {value_of(config, need.setting)} needs at least "
                f"{need.num_bytes / GIBIBYTE:.3g} GiB of memory, and {place} has "
                f"{limit / GIBIBYTE:.3g} GiB; use a smaller value"
            )


def needs(
    config: ConfigDict, num_dims: int, num_devices: int, parts: tuple[str, ...]
) -> Iterator[Need]:
    """The largest arrays of some experiments.

    Args:
      config: the config.
      num_dims: the dimensions of an image.
      num_devices: over how many devices a batch is split.
      parts: names of experiments.
    """
    evaluate, sample, quality = config.evaluate, config.sample, config.quality
    image = FLOAT * num_dims
    if config.model.name == "unet":
        # Training has parameters, their average, a gradient and two moments.
        copies = 5 / config.devices.fsdp if "train" in parts else 1
        yield Need("model.unet.channels", FLOAT * unet_parameters(config.model.unet) * copies)
    if "train" in parts:
        rows = config.train.batch_size / config.train.accumulate / num_devices
        yield Need("train.batch_size", rows * image)
    if "compress" in parts:
        yield Need("compress.batch_size", config.compress.batch_size / num_devices * image)
    if {"evaluate", "variance", "sigma", "spacing", "compress", "ablate"} & set(parts):
        rows = evaluate.batch_size / num_devices
        yield Need("evaluate.batch_size", rows * image)
        yield Need("evaluate.chunk_size", rows * image * evaluate.chunk_size)
        yield Need("analytic.levels", config.analytic.levels * num_dims * DOUBLE, False)
    if "evaluate" in parts and "k_sample" in evaluate.also:
        rows = evaluate.batch_size / num_devices * evaluate.k_sample.num_samples
        yield Need("evaluate.k_sample.num_samples", rows * image)
    if {"train", "sample"} & set(parts):
        yield Need("sample.batch_size", sample.batch_size / num_devices * image)
        yield Need("sample.strip_columns", sample.strip_rows * sample.strip_columns * image, False)
    if "sample" in parts:
        yield Need("sample.num_samples", sample.num_samples * num_dims, False)  # bytes
        inpainted = sample.strip_rows * sample.inpaint.num_samples * image
        yield Need("sample.inpaint.num_samples", inpainted * ("inpaint" in sample.also), False)
    measures = config.ablate.measures if "ablate" in parts else ()
    if "quality" in (*evaluate.also, *measures) or {"sweep", "guidance"} & set(sample.also):
        yield Need("quality.num_samples", quality.num_samples * num_dims, False)
    if "variance" in parts:
        draws = config.variance.draws * config.variance.examples
        yield Need("variance.draws", draws * DOUBLE, False)
    if "spacing" in parts:
        # The costs of all pairs of levels, and the errors at each level.
        candidates = config.spacing.candidates
        pairs = candidates * (candidates + num_dims) * DOUBLE
        yield Need("spacing.candidates", pairs, False)


def unet_parameters(unet: ConfigDict) -> int:
    """At most as many parameters as a U-Net has: the second convolution of each block alone."""
    widths = [unet.channels * multiplier for multiplier in unet.channel_multipliers]
    blocks = 2 * unet.num_res_blocks + 1  # on the way down and up
    return sum(9 * width**2 * blocks for width in widths)


def host_bytes() -> int:
    """Memory of this machine; unlimited where the platform does not say."""
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_bytes() -> int:
    """Memory of a device; of a CPU that of the machine."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit", host_bytes())
