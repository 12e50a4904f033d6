"""Extras of sampling: inpainting, interpolation, encoding and a comparison of guidance scales."""

import functools
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from configs.settings.declaration import unknown
from diffusion.samplers import interpolation
from diffusion.samplers.base import sample
from diffusion.samplers.ddpm import ddim, ddim_encode
from diffusion.schedules import Levels
from experiments.harness import devices
from experiments.harness.data import splits
from experiments.harness.data.batches import over_examples
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.processes.progress import progress
from experiments.harness.processes.shared_programs import share
from experiments.harness.sampling import quality, sweep
from experiments.harness.sampling.draw import (
    Drawer,
    far_from_data,
    save_strip,
    to_grey_levels,
)
from experiments.harness.sampling.sampler import Inputs
from experiments.harness.setup.definition import ModelDefinition
from experiments.harness.setup.trained import Run
from experiments.harness.workdir.files import write_npz

MASKS = ("left", "right", "top", "bottom", "border")
LARGE_ERROR = 0.05  # of the range, after encoding and decoding
_UNKNOWN = 0.0  # grey stands for the unknown part in a picture


def inpaint(run: Run) -> None:
    """Samples the unknown part of test images, given the rest: inpaint.png and inpaint.npz."""
    config, definition, settings = run.config, run.definition, run.config.sample.inpaint
    dataset = splits.load_data(config, "test", splits.first(config.sample.strip_rows))
    x_0 = np.asarray(definition.to_data(dataset.images))
    mask = known_part(config, definition)
    n, each = len(x_0), settings.num_samples

    def make_inputs(index):
        labels = None if dataset.labels is None else dataset.labels[index // each]
        masks = np.broadcast_to(mask, (len(index), *mask.shape))
        return Inputs(index, labels, x_0[index // each], masks)

    levels, drawer = run.levels(settings.num_timesteps), Drawer(config, definition)
    samples = drawer(run.params, levels, n * each, make_inputs=make_inputs).x_0
    samples = samples.reshape(n, each, *samples.shape[1:])
    frames = np.stack([x_0, np.where(mask, x_0, _UNKNOWN), *samples.swapaxes(0, 1)])
    captions = ["data", "known", *(f"sample {i + 1}" for i in range(each))]
    directory = run.workdir / "samples"
    save_strip(directory / "inpaint.png", definition, frames, captions)
    grey_levels = to_grey_levels(definition, samples)
    write_npz(directory / "inpaint.npz", samples=grey_levels, x_0=samples, mask=mask)


def known_part(config: ConfigDict, definition: ModelDefinition) -> Bool[np.ndarray, "h w c"]:
    """The mask of the known part: a half, the border, or an array [h, w] from a .npy file.

    Raises:
      ConfigError: if the file is missing, or its array has another shape.
    """
    name, (h, w, c) = config.sample.inpaint.known, definition.image_shape
    rows, columns = np.mgrid[:h, :w]
    inner = (rows >= h // 4) & (rows < h - h // 4) & (columns >= w // 4) & (columns < w - w // 4)
    masks = {
        "left": columns < w // 2,
        "right": columns >= w // 2,
        "top": rows < h // 2,
        "bottom": rows >= h // 2,
        "border": ~inner,
    }
    mask = masks[name] if name in masks else _mask_of_file(name)
    if mask.shape != (h, w):
        raise ConfigError(
            f"config.sample.inpaint.known = {name!r} holds an array {mask.shape}; it must be "
            f"{(h, w)}, true where the image is known"
        )
    return np.broadcast_to(mask[..., None], (h, w, c))


def _mask_of_file(name: str) -> Bool[np.ndarray, "..."]:
    if not name.endswith(".npy") or not epath.Path(name).exists():
        raise ConfigError(
            f"config.sample.inpaint.known = {name!r}{unknown(name, MASKS)} or a .npy file that "
            "exists"
        )
    try:
        with epath.Path(name).open("rb") as file:
            return np.asarray(np.load(file), bool)
    except ValueError as error:
        raise ConfigError(
            f"config.sample.inpaint.known = {name!r} holds no array of numbers: {error}"
        ) from error


def interpolate(run: Run) -> None:
    """Interpolates pairs of test images through their noise: interpolate.png, interpolate.npz.

    They are encoded and decoded by deterministic DDIM without labels, because the two images may
    belong to two classes.
    """
    config, definition, settings = run.config, run.definition, run.config.sample.interpolate
    images = splits.load_data(config, "test", splits.first(2 * config.sample.strip_rows)).images
    x_0 = np.asarray(definition.to_data(images))
    x_0_a, x_0_b = x_0[: len(x_0) // 2], x_0[len(x_0) - len(x_0) // 2 :]
    levels = run.levels(settings.num_timesteps)
    weights = np.linspace(0.0, 1.0, settings.columns)

    @share
    @jax.jit
    def blend(params: Any, levels: Levels, x_0_a: Array, x_0_b: Array) -> Array:
        model = definition.model(params)._replace(levels=levels)
        return interpolation.interpolate(model, ddim(model), x_0_a, x_0_b, np.float32(weights))

    params = devices.place(run.params, devices.replicated(devices.mesh()))
    blended = np.asarray(blend(params, levels, x_0_a, x_0_b))
    _check_decoded(definition, "interpolate", blended, levels.num_timesteps)
    frames = np.stack([x_0_a, *blended, x_0_b])
    captions = ["data", *(f"{weight:.2f}" for weight in weights), "data"]
    directory = run.workdir / "samples"
    save_strip(directory / "interpolate.png", definition, frames, captions)
    write_npz(directory / "interpolate.npz", x_0=blended, weights=weights)


def encode(run: Run) -> None:
    """Encodes the test split to noise and decodes it: encode.png, encode.npz; prints the error.

    By deterministic DDIM and its inverse, given the labels if the model is class-conditional.
    """
    config, definition, settings = run.config, run.definition, run.config.sample.encode
    dataset = splits.load_data(config, "test")
    x_0 = np.asarray(definition.to_data(dataset.images))
    levels, mesh = run.levels(settings.num_timesteps), devices.mesh()
    whole, split = devices.replicated(mesh), devices.split_batch(mesh)

    @share
    @functools.partial(jax.jit, in_shardings=(whole, whole, split, split), out_shardings=split)
    def encode_decode(
        params: Any, levels: Levels, x_0: Array, labels: Array | None
    ) -> tuple[Array, Array]:
        model = definition.model(params, labels)._replace(levels=levels)
        x_T = ddim_encode(model, x_0, settings.iterations)
        return x_T, sample(ddim(model), levels, lambda t: x_T, len(x_T), x_T=x_T).x_0

    params, n = devices.place(run.params, whole), len(x_0)

    def encode_batch(index):
        return encode_decode(params, levels, x_0[index], dataset.examples(index).labels)

    with progress(n, "encode and decode", "img", leave=False) as bar:
        both = over_examples(encode_batch, n, config.sample.batch_size, bar)
    x_T, decoded = map(np.float32, both)
    _check_decoded(definition, "encode", decoded, levels.num_timesteps)
    ends = x_0 if definition.quantization is None else definition.quantization.values
    error = float(np.abs(both[1] - x_0).mean() / np.ptp(ends))
    directory, rows = run.workdir / "samples", config.sample.strip_rows
    frames = np.stack([x_0[:rows], x_T[:rows], decoded[:rows]])
    save_strip(directory / "encode.png", definition, frames, ["data", "noise", "decoded"])
    write_npz(directory / "encode.npz", x_T=x_T, x_0=decoded, mean_absolute_error=error)
    remark = ""
    if error > LARGE_ERROR:
        remark = (
            f"; that is large: take more than config.sample.encode.num_timesteps = "
            f"{levels.num_timesteps}"
        )
    print(f"encoded and decoded {n} test images: mean error {error:.3%} of the range{remark}")


def _check_decoded(
    definition: ModelDefinition, setting: str, x_0: Float[np.ndarray, "*b"], num_timesteps: int
) -> None:
    """Raises RunError if images decoded by DDIM are not finite, or lie far outside the data."""
    excess = "are not finite"
    if np.isfinite(x_0).all():
        excess = far_from_data(definition, x_0)
    if excess:
        raise RunError(
            f"images decoded by DDIM {excess}: config.sample.{setting}.num_timesteps = "
            f"{num_timesteps} is too few for this model, which predicts "
            f"{definition.parameterization!r}; take more"
        )


def guidance(run: Run) -> None:
    """Samples at several scales of guidance: guidance.png with a row for each class, guidance.md.

    The table has the quality at each scale, by the config's sampler and number of levels.
    """
    config, definition = run.config, run.definition
    levels, frames, entries = run.levels(config.sample.num_timesteps), [], []
    reference = quality.reference(config, run.workdir)
    num_classes = len(config.sample.labels) or definition.num_classes
    for scale in config.sample.guidance.scales:
        scaled = with_scale(config, scale)
        samples = Drawer(scaled, definition)(run.params, levels, config.quality.num_samples)
        frames.append(samples.x_0[:num_classes])  # samples have the classes in turn
        name = f"{config.sample.sampler}, scale {scale:g}"
        entries.append(sweep.measure(run, reference, name, levels.num_timesteps, samples))
    captions = [f"scale {scale:g}" for scale in config.sample.guidance.scales]
    directory = run.workdir / "samples"
    save_strip(directory / "guidance.png", definition, np.stack(frames), captions)
    (directory / "guidance.md").write_text(sweep.to_markdown(entries) + "\n")


def with_scale(config: ConfigDict, scale: float) -> ConfigDict:
    """The config with another guidance scale."""
    changed = config.copy_and_resolve_references()
    changed.sample.guidance.scale = float(scale)
    return changed


def check_guidance(config: ConfigDict, definition: ModelDefinition) -> None:
    """Raises ConfigError unless the samples of a scale include every class that is shown."""
    num_samples = config.quality.num_samples
    classes = len(config.sample.labels) or definition.num_classes
    if num_samples < classes:
        raise ConfigError(
            f"config.quality.num_samples = {num_samples}; it must be at least {classes}: one of "
            "every class is shown"
        )
