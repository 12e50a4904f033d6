"""Samples of a trained model, and the way from noise to data and from data to noise as pictures."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion.forward import diffuse
from diffusion.samplers import SAMPLERS, Samples
from experiments.harness import analytic, data, devices, measure, pictures, settings
from experiments.harness import workdir as workdirs
from experiments.harness.checkpoints import CHECKPOINTS, load_ema
from experiments.harness.metrics import write_npz
from experiments.harness.progress import progress
from experiments.harness.seeds import stream
from experiments.harness.settings import Problem
from experiments.harness.state import abstract_params


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Samples from what the work directory holds."""
    sample(config, workdir)
    print(f"{config.sample.num_samples} samples are in {epath.Path(workdir) / 'samples'}")


def sample(config: ConfigDict, workdir: epath.PathLike) -> np.ndarray:
    """Draws samples from the EMA weights and writes them to the work directory's samples/.

    Writes samples.png and samples.npz (all of them), reverse.png (x_t and x̂_0 on the way down)
    and forward.png (test images on the way up). Sample i depends on (seed, i) alone.

    Args:
      config: `sample` says how many and how.
      workdir: holds the checkpoints.

    Returns:
      uint8 [n, h, w, c], grey levels.

    Raises:
      ConfigError: for a setting or a checkpoint that does not fit.
    """
    check(config)
    workdirs.check_network(config, workdir)
    problem = settings.build(config)
    params, step = load_ema(workdir, config.sample.checkpoint, abstract_params(problem))
    problem = problem.learned(params)
    workdirs.check_writable(workdir)
    setting = "config.sample.variance"
    problem = analytic.choose(
        config, config.sample.variance, setting, problem, params, step, workdir
    )
    num_timesteps = config.sample.num_timesteps or problem.levels.num_timesteps
    record = strip_levels(num_timesteps, config.sample.strip_columns)
    parts = make_draw(config, problem, num_timesteps, record)(params, config.sample.num_samples)
    samples = np.asarray(problem.quantization.to_level(parts.x_0), np.uint8)
    directory = epath.Path(workdir) / "samples"
    directory.mkdir(parents=True, exist_ok=True)
    pictures.save_png(directory / "samples.png", pictures.grid(to_bytes(problem, parts.x_0)))
    rows = config.sample.strip_rows
    _save_reverse_strip(directory / "reverse.png", problem, parts, record, rows)
    _save_forward_strip(directory / "forward.png", config, problem)
    # Last, and whole: with it the samples are finished.
    write_npz(
        directory / "samples.npz",
        samples=samples,
        x_0=parts.x_0,
        step=step,
        seed=config.seed,
        identity=identity(config, step),
    )
    return samples


def identity(config: ConfigDict, step: int) -> str:
    """What samples are of, as JSON: two with the same identity are the same samples."""
    told = config.to_dict()
    del told["train"], told["evaluate"], told["sigma"], told["variance"]
    del told["sample"]["batch_size"], told["data"]["data_dir"]
    if config.sample.variance not in analytic.ANALYTIC:
        del told["analytic"]
    return json.dumps({"step": step, **workdirs.flatten(told)}, sort_keys=True)


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that `sample` can't use; compiles nothing."""
    settings.build(config)
    settings.describe_data(config, "test")  # the strip of the forward process
    devices.check_batch("config.sample.batch_size", config.sample.batch_size)
    settings.check_positive(
        config, "sample.num_samples", "sample.strip_rows", "sample.strip_columns"
    )
    settings.pick(CHECKPOINTS, config.sample.checkpoint, "config.sample.checkpoint")
    settings.pick(SAMPLERS, config.sample.sampler, "config.sample.sampler")
    of_eta = "it must be in [0, 1]"
    settings.check_setting(config, "sample.ddim.eta", lambda eta: 0 <= eta <= 1, of_eta)
    analytic.check(config, config.sample.variance, "config.sample.variance")
    remedy = "give a number of levels, or 0 for all of the schedule's"
    settings.check_setting(config, "sample.num_timesteps", lambda n: n >= 0, remedy)


def make_draw(
    config: ConfigDict, problem: Problem, num_timesteps: int, record: tuple[int, ...] = ()
) -> Callable[[Any, int], Samples]:
    """A function (params, n) -> Samples of n, as host arrays, in batches of `sample.batch_size`.

    States at the recorded levels are kept for the first `sample.strip_rows` samples.
    """
    mesh = devices.mesh()
    run_sampler = measure.make_sampler(config, problem, mesh, record)
    rows = config.sample.strip_rows

    def draw(params: Any, n: int) -> Samples:
        levels = problem.learned(params).schedule.levels(num_timesteps)
        params = devices.place(params, devices.replicated(mesh))
        parts = []
        with progress(n, "sample", "img", delay=2, leave=False) as bar:
            for index, mask in data.padded_batches(n, config.sample.batch_size):
                made = jax.device_get(run_sampler(params, levels, index))
                shown = min(int(mask.sum()), rows)
                parts.append(Samples(made.x_0[mask], made.x_t[:, :shown], made.x_0_hat[:, :shown]))
                bar.update(int(mask.sum()))
        return Samples(
            np.concatenate([part.x_0 for part in parts]),
            np.concatenate([part.x_t for part in parts], axis=1)[:, :rows],
            np.concatenate([part.x_0_hat for part in parts], axis=1)[:, :rows],
        )

    return draw


def strip_levels(num_timesteps: int, columns: int) -> tuple[int, ...]:
    """Levels from T down to 1 to show, evenly spaced and without repeats."""
    return tuple(
        int(t) for t in sorted(set(np.linspace(1, num_timesteps, columns).round()), reverse=True)
    )


def to_bytes(problem: Problem, x: np.ndarray) -> np.ndarray:
    """Data values as bytes for a picture: [−1, 1] to [0, 255], clipped; one channel or three."""
    x = x if x.shape[-1] in (1, 3) else x[..., :1]
    ends = problem.quantization.values[-1]
    return np.clip(np.round((np.asarray(x) / ends + 1) * 127.5), 0, 255).astype(np.uint8)


def _save_reverse_strip(
    path: epath.Path, problem: Problem, parts: Samples, record: tuple[int, ...], rows: int
) -> None:
    """For each sample a row of x_t, and under it a row of the x̂_0 seen from there."""
    x_0 = parts.x_0[:rows]
    frames = np.stack([*parts.x_t, x_0]), np.stack([*parts.x_0_hat, x_0])
    both = np.stack(frames, axis=2)  # [k, n, 2, ...]
    both = both.reshape(len(both), -1, *both.shape[3:])
    captions = [f"t = {t}" for t in record] + ["sample"]
    pictures.save_png(path, pictures.strip(to_bytes(problem, both), captions))


def _save_forward_strip(path: epath.Path, config: ConfigDict, problem: Problem) -> None:
    """Test images and their x_t, all along one line of noise."""
    rows = config.sample.strip_rows
    images = settings.load_data(config, "test").images[:rows]
    x_0 = problem.quantization.to_data(images)
    eps = jax.random.normal(stream(config.seed, "sample"), x_0.shape)
    times = strip_levels(problem.levels.num_timesteps, config.sample.strip_columns)[::-1]
    frames = [x_0]
    for t in times:
        log_snr = problem.levels.step(jnp.full(len(x_0), t)).log_snr
        frames.append(diffuse(x_0, log_snr, eps))
    captions = ["data"] + [f"t = {t}" for t in times]
    pictures.save_png(path, pictures.strip(to_bytes(problem, np.stack(frames)), captions))
