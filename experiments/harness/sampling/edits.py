"""Pictures beside the samples: images completed, blended into one another, and guided."""

import functools
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Bool
from ml_collections import ConfigDict

from configs.settings.declaration import unknown
from diffusion.samplers import interpolation
from diffusion.samplers.base import sample
from diffusion.samplers.ddpm import ddim, ddim_encode
from experiments.harness import devices
from experiments.harness.data import splits
from experiments.harness.data.batches import over_examples
from experiments.harness.errors import ConfigError
from experiments.harness.pictures.images import save_png, strip
from experiments.harness.processes.progress import progress
from experiments.harness.sampling import quality, sweep
from experiments.harness.sampling.draw import Drawer, to_bytes
from experiments.harness.sampling.sampler import Given
from experiments.harness.setup.definition import ModelDefinition
from experiments.harness.setup.trained import Run
from experiments.harness.workdir.files import write_npz

MASKS = ("left", "right", "top", "bottom", "border")
_UNKNOWN = 0.0  # grey: how a picture shows what is not known


def inpaint(run: Run) -> None:
    """Test images of which a part is kept, and samples of the rest: inpaint.png and inpaint.npz."""
    config, definition = run.config, run.definition
    of = config.sample.inpaint
    dataset = splits.load_data(config, "test", splits.first(config.sample.strip_rows))
    known = np.asarray(definition.quantization.to_data(dataset.images))
    mask = known_part(config, definition)
    n, each = len(known), of.num_samples

    def give(index):
        labels = None if dataset.labels is None else dataset.labels[index // each]
        masks = np.broadcast_to(mask, (len(index), *mask.shape))
        return Given(index, labels, known[index // each], masks)

    levels = run.levels(of.num_timesteps)
    made = Drawer(config, definition)(run.params, levels, n * each, give=give).x_0
    made = made.reshape(n, each, *made.shape[1:])
    frames = [known, np.where(mask, known, _UNKNOWN), *made.swapaxes(0, 1)]
    captions = ["data", "known", *(f"sample {i + 1}" for i in range(each))]
    directory = run.workdir / "samples"
    table = strip(to_bytes(definition, np.stack(frames)), captions)
    save_png(directory / "inpaint.png", table)
    samples = np.asarray(definition.quantization.to_level(made), np.uint8)
    write_npz(directory / "inpaint.npz", samples=samples, x_0=made, mask=mask)


def known_part(config: ConfigDict, definition: ModelDefinition) -> Bool[np.ndarray, "h w c"]:
    """Where an image is kept: a half, the border, or what a .npy file of [h, w] says.

    Raises:
      ConfigError: for a file that is missing or does not fit.
    """
    name, (h, w, c) = config.sample.inpaint.known, definition.image_shape
    rows, columns = np.mgrid[:h, :w]
    inner = (rows >= h // 4) & (rows < h - h // 4) & (columns >= w // 4) & (columns < w - w // 4)
    named = {
        "left": columns < w // 2,
        "right": columns >= w // 2,
        "top": rows < h // 2,
        "bottom": rows >= h // 2,
        "border": ~inner,
    }
    mask = named[name] if name in named else _mask_of_file(name)
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
    """Test images blended into one another by their noise: interpolate.png and interpolate.npz.

    Encoded and decoded by deterministic DDIM, without labels: two images may be of two classes.
    """
    config, definition = run.config, run.definition
    of, rows = config.sample.interpolate, config.sample.strip_rows
    images = splits.load_data(config, "test", splits.first(2 * rows)).images
    x_0 = np.asarray(definition.quantization.to_data(images))
    x_0_a, x_0_b = x_0[: len(x_0) // 2], x_0[len(x_0) - len(x_0) // 2 :]
    levels = run.levels(of.num_timesteps)
    weights = np.linspace(0.0, 1.0, of.columns)

    @jax.jit
    def blend(params, x_0_a: Array, x_0_b: Array) -> Array:
        model = definition.model(params)._replace(levels=levels)
        return interpolation.interpolate(model, ddim(model), x_0_a, x_0_b, np.float32(weights))

    params = devices.place(run.params, devices.replicated(devices.mesh()))
    made = np.asarray(blend(params, x_0_a, x_0_b))
    frames = np.stack([x_0_a, *made, x_0_b])
    captions = ["data", *(f"{weight:.2f}" for weight in weights), "data"]
    directory = run.workdir / "samples"
    table = strip(to_bytes(definition, frames), captions)
    save_png(directory / "interpolate.png", table)
    write_npz(directory / "interpolate.npz", x_0=made, weights=weights)


def encode(run: Run) -> None:
    """The test split encoded to noise and decoded: encode.png, encode.npz, and the error printed.

    By deterministic DDIM and its inverse, every image once, given its label if the model knows any.
    """
    config, definition = run.config, run.definition
    of, size = config.sample.encode, config.sample.batch_size
    dataset = splits.load_data(config, "test")
    x_0 = np.asarray(definition.quantization.to_data(dataset.images))
    levels, mesh = run.levels(of.num_timesteps), devices.mesh()
    whole, split = devices.replicated(mesh), devices.split_batch(mesh)

    @functools.partial(jax.jit, in_shardings=(whole, split, split), out_shardings=split)
    def encode_decode(params: Any, x_0: Array, labels: Array | None) -> tuple[Array, Array]:
        model = definition.model(params, labels)._replace(levels=levels)
        x_T = ddim_encode(model, x_0, of.iterations)
        return x_T, sample(ddim(model), levels, lambda t: x_T, len(x_T), x_T=x_T).x_0

    params = devices.place(run.params, whole)

    def encode_batch(index):
        return encode_decode(params, x_0[index], dataset.examples(index).labels)

    with progress(len(x_0), "encode and decode", "img", leave=False) as bar:
        noise, back = over_examples(encode_batch, len(x_0), size, bar)
    error = float(np.abs(back - x_0).mean() / np.ptp(definition.quantization.values))
    noise, back = np.float32(noise), np.float32(back)
    directory, rows = run.workdir / "samples", config.sample.strip_rows
    frames = np.stack([x_0[:rows], noise[:rows], back[:rows]])
    table = strip(to_bytes(definition, frames), ["data", "noise", "decoded"])
    save_png(directory / "encode.png", table)
    write_npz(directory / "encode.npz", x_T=noise, x_0=back, mean_absolute_error=error)
    print(f"encoded and decoded {len(x_0)} test images: mean error {error:.3%} of the range")


def guidance(run: Run) -> None:
    """Several scales of guidance: guidance.png, a row a class, and the quality of each.

    By the config's sampler and number of levels; guidance.md has the table.
    """
    config, definition = run.config, run.definition
    levels, frames, entries = run.levels(config.sample.num_timesteps), [], []
    against = quality.reference(config, run.workdir)
    classes = np.array(config.sample.labels or range(definition.num_classes), np.int32)
    for scale in config.sample.guidance.scales:
        changed = run._replace(config=with_scale(config, scale))
        drawer, n = Drawer(changed.config, definition), config.quality.num_samples
        made = drawer(run.params, levels, n)  # of the classes in turn
        frames.append(made.x_0[: len(classes)])
        name = f"{config.sample.sampler}, scale {scale:g}"
        entries.append(sweep.measure(changed, against, name, levels.num_timesteps, made))
    captions = [f"scale {scale:g}" for scale in config.sample.guidance.scales]
    table = strip(to_bytes(definition, np.stack(frames)), captions)
    directory = run.workdir / "samples"
    save_png(directory / "guidance.png", table)
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
