"""Samples of a trained model, and the way from noise to data and from data to noise as pictures."""

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
from experiments.harness.pictures.images import grid, save_png, strip
from experiments.harness.sampling import edits, quality, sampler, sweep
from experiments.harness.sampling.draw import Drawer, to_bytes
from experiments.harness.seeds import stream
from experiments.harness.setup.definition import ModelDefinition, define_model
from experiments.harness.setup.trained import load
from experiments.harness.workdir import provenance
from experiments.harness.workdir.files import write_npz
from experiments.harness.workdir.provenance import SAMPLES

EXTRAS = {
    "inpaint": edits.inpaint,
    "interpolate": edits.interpolate,
    "encode": edits.encode,
    "guidance": edits.guidance,
    "sweep": sweep.sweep,
}
"""What `sample.also` can name: each takes a `Run` and writes to samples/."""


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Samples from what the work directory holds."""
    sample(config, workdir)
    print(f"{config.sample.num_samples} samples are in {epath.Path(workdir) / 'samples'}")


def sample(config: ConfigDict, workdir: epath.PathLike, checked: bool = False) -> np.ndarray:
    """Draws samples from the EMA weights and writes them to the work directory's samples/.

    Writes samples.png and samples.npz (all of them), reverse.png (x_t and x̂_0 on the way down)
    and forward.png (test images on the way up), and what `sample.also` names. Sample i depends on
    (seed, i) alone.

    Args:
      config: `sample` says how many and how.
      workdir: holds the checkpoints.
      checked: whether the config has passed `check`.

    Returns:
      uint8 [n, h, w, c], grey levels.

    Raises:
      ConfigError: for a setting or a checkpoint that does not fit.
    """
    if not checked:
        check(config)
    run = load(config, workdir, config.sample.checkpoint)
    run = run.with_variance(config.sample.variance)
    for num_timesteps in sampler.needed_levels(config, run.definition):
        run.levels(num_timesteps)  # raises, where some are missing
    definition, of = run.definition, config.sample
    levels = run.levels(of.num_timesteps)
    record = strip_levels(levels.num_timesteps, of.strip_columns)
    drawer = Drawer(config, definition)
    parts = drawer(run.params, levels, of.num_samples, record, of.strip_rows)
    samples = np.asarray(definition.quantization.to_level(parts.x_0), np.uint8)
    directory = run.workdir / "samples"
    directory.mkdir(parents=True, exist_ok=True)
    save_png(directory / "samples.png", grid(to_bytes(definition, parts.x_0)))
    _save_reverse_strip(directory / "reverse.png", definition, parts, record, of.strip_rows)
    _save_forward_strip(directory / "forward.png", config, definition)
    for name in of.also:
        EXTRAS[name](run)
    labels = drawer.given(np.arange(of.num_samples)).labels
    # Last, and whole: with it the samples are finished.
    write_npz(
        directory / "samples.npz",
        samples=samples,
        x_0=parts.x_0,
        evaluations=parts.evaluations,
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
    memory.check_memory(config, definition.image_shape, "sample")
    splits.check_split(config, "test")  # the strip of the forward process
    devices.check_batch("config.sample.batch_size", config.sample.batch_size)
    sampler.check(config, definition)
    if "inpaint" in also:
        edits.known_part(config, definition)
    if {"sweep", "guidance"} & set(also):
        quality.check(config)
    if "guidance" in also:
        edits.check_guidance(config, definition)


def strip_levels(num_timesteps: int, columns: int) -> tuple[int, ...]:
    """Levels from T down to 1 to show, evenly spaced and without repeats."""
    return tuple(
        int(t) for t in sorted(set(np.linspace(1, num_timesteps, columns).round()), reverse=True)
    )


def _save_reverse_strip(
    path: epath.Path,
    definition: ModelDefinition,
    parts: Samples,
    record: tuple[int, ...],
    rows: int,
) -> None:
    """For each sample a row of x_t, and under it a row of the x̂_0 seen from there."""
    x_0 = parts.x_0[:rows]
    frames = np.stack([*parts.x_t, x_0]), np.stack([*parts.x_0_hat, x_0])
    both = np.stack(frames, axis=2)  # [k, n, 2, ...]
    both = both.reshape(len(both), -1, *both.shape[3:])
    captions = [f"t = {t}" for t in record] + ["sample"]
    save_png(path, strip(to_bytes(definition, both), captions))


def _save_forward_strip(path: epath.Path, config: ConfigDict, definition: ModelDefinition) -> None:
    """Test images and their x_t, all along one line of noise."""
    rows = config.sample.strip_rows
    images = splits.load_data(config, "test", splits.first(rows)).images
    x_0 = definition.quantization.to_data(images)
    eps = jax.random.normal(stream(config.seed, "sample"), x_0.shape)
    times = strip_levels(definition.levels.num_timesteps, config.sample.strip_columns)[::-1]
    frames = [x_0]
    for t in times:
        log_snr = definition.levels.step(jnp.full(len(x_0), t)).log_snr
        frames.append(diffuse(x_0, log_snr, eps))
    captions = ["data"] + [f"t = {t}" for t in times]
    save_png(path, strip(to_bytes(definition, np.stack(frames)), captions))
