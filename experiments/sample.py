"""Samples of a trained model, and pictures of its reverse and forward processes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion.forward import diffuse
from diffusion.samplers.base import Samples
from experiments.harness import checks, devices, memory
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError
from experiments.harness.sampling import edits, quality, sampler, sweep
from experiments.harness.sampling.draw import (
    Drawer,
    save_grid,
    save_strip,
    strip_rows,
    to_grey_levels,
)
from experiments.harness.seeds import stream
from experiments.harness.setup.definition import (
    ModelDefinition,
    define_model,
    require_grey_levels,
)
from experiments.harness.setup.trained import load
from experiments.harness.workdir import metrics, provenance
from experiments.harness.workdir.dependences import SAMPLES
from experiments.harness.workdir.files import write_npz

EXTRAS = {
    "inpaint": edits.inpaint,
    "interpolate": edits.interpolate,
    "encode": edits.encode,
    "guidance": edits.guidance,
    "sweep": sweep.sweep,
}
"""The extras that `sample.also` can name. Each takes a `Run` and writes to samples/."""


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Samples from the model of a work directory."""
    sample(config, workdir)
    print(f"{config.sample.num_samples} samples are in {epath.Path(workdir) / 'samples'}")


def sample(config: ConfigDict, workdir: epath.PathLike, checked: bool = False) -> np.ndarray:
    """Draws samples with the EMA weights and writes them to samples/ in the work directory.

    Writes samples.png and samples.npz (all samples), reverse.png (x_t and x̂_0 of the reverse
    process), forward.png (noisy test images), and the extras in `sample.also`. Sample i depends on
    (seed, i) only.

    Args:
      config: the config; `sample` has the number of samples and the sampler.
      workdir: holds the checkpoints.
      checked: whether the config has passed `check`.

    Returns:
      uint8 [n, h, w, c], grey levels; of continuous data, floats [n, …] in data units.

    Raises:
      ConfigError: for a setting or a checkpoint that does not fit.
    """
    if not checked:
        check(config)
    run = load(config, workdir, config.sample.checkpoint).with_variance(config.sample.variance)
    for num_timesteps in sampler.needed_levels(config, run.definition):
        run.levels(num_timesteps)  # raises now if some are missing
    definition, settings, n = run.definition, config.sample, config.sample.num_samples
    levels = run.levels(settings.num_timesteps)
    record = strip_levels(levels.num_timesteps, settings.strip_columns)
    drawer = Drawer(config, definition)
    drawn = drawer(run.params, levels, n, record, strip_rows(config, definition))
    samples = to_grey_levels(definition, drawn.x_0)
    directory = run.workdir / "samples"
    directory.mkdir(parents=True, exist_ok=True)
    save_grid(directory / "samples.png", definition, drawn.x_0)
    _save_reverse_strip(directory / "reverse.png", definition, drawn, record)
    _save_forward_strip(directory / "forward.png", config, definition)
    for name in settings.also:
        EXTRAS[name](run)
    names = ("samples", "reverse", "forward", *settings.also)
    pictures = {f"samples/{name}": directory / f"{name}.png" for name in names}
    metrics.show(workdir, run.step, pictures=pictures)
    labels = drawer.inputs(np.arange(n)).labels
    # This file is written last: if it exists, the samples are complete.
    write_npz(
        directory / "samples.npz",
        samples=samples,
        x_0=drawn.x_0,
        evaluations=drawn.evaluations,
        **({} if labels is None else {"labels": labels}),
        step=run.step,
        seed=config.seed,
        identity=json.dumps(
            provenance.identity(
                SAMPLES, config, run.step, workdir, data=splits.fingerprints(config)
            )
        ),
    )
    return samples


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that `sample` can't use; compiles nothing."""
    checks.check(config, "sample")
    check_fit(config, define_model(config))


def check_fit(config: ConfigDict, definition: ModelDefinition) -> None:
    """Raises ConfigError unless checked settings fit the data and the devices."""
    also = config.sample.also
    if also and not definition.are_images:
        raise ConfigError(f"config.sample.also = {also}, but the data are no images; use ()")
    memory.check_memory(config, definition.image_shape, "sample")
    splits.check_split(config, "test")  # the strip of the forward process
    devices.check_batch("config.sample.batch_size", config.sample.batch_size)
    sampler.check(config, definition)
    if "inpaint" in also:
        edits.known_part(config, definition)
    if {"sweep", "guidance"} & set(also):
        require_grey_levels(definition, "sample.also", also, "leave out sweep and guidance")
        quality.check(config)
    if "guidance" in also:
        edits.check_guidance(config, definition)


def strip_levels(num_timesteps: int, columns: int) -> tuple[int, ...]:
    """The levels of a strip: from T down to 1, evenly spaced, without repeats."""
    return tuple(
        int(t) for t in sorted(set(np.linspace(1, num_timesteps, columns).round()), reverse=True)
    )


def _save_reverse_strip(
    path: epath.Path, definition: ModelDefinition, samples: Samples, record: tuple[int, ...]
) -> None:
    """Draws for each sample a row of x_t, and below it a row of the x̂_0 predicted from x_t.

    Of samples that are no images only x_t is drawn.
    """
    x_0 = samples.x_0[: samples.x_t.shape[1]]
    frames, predictions = np.stack([*samples.x_t, x_0]), np.stack([*samples.x_0_hat, x_0])
    if definition.are_images:
        both = np.stack([frames, predictions], axis=2)  # [k, n, 2, ...]
        frames = both.reshape(len(both), -1, *both.shape[3:])
    save_strip(path, definition, frames, [f"t = {t}" for t in record] + ["sample"])


def _save_forward_strip(path: epath.Path, config: ConfigDict, definition: ModelDefinition) -> None:
    """Draws test images and their x_t, with the same noise ε at all t."""
    rows = strip_rows(config, definition)
    images = splits.load_data(config, "test", splits.first(rows)).images
    x_0 = definition.to_data(images)
    eps = jax.random.normal(stream(config.seed, "sample"), x_0.shape)
    times = strip_levels(definition.levels.num_timesteps, config.sample.strip_columns)[::-1]
    frames = [x_0]
    for t in times:
        log_snr = definition.levels.step(jnp.full(len(x_0), t)).log_snr
        frames.append(diffuse(x_0, log_snr, eps))
    save_strip(path, definition, np.stack(frames), ["data"] + [f"t = {t}" for t in times])
