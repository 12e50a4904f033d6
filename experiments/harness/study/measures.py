"""What is measured of a cell, each measurement a file in the work directory of its network.

The examples and the noise are the same for all cells and training seeds: the noise is a function of
the study's seed, the example, t and the number of the draw.
"""

import json
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict

from experiments.harness import checks, devices, memory
from experiments.harness.data import splits
from experiments.harness.evaluation import paired
from experiments.harness.evaluation.paired import Choice
from experiments.harness.evaluation.subject import subject_of
from experiments.harness.sampling import quality, sampler
from experiments.harness.setup import trained
from experiments.harness.setup.definition import (
    check_levels,
    define_model,
    require_grey_levels,
)
from experiments.harness.setup.trained import Run
from experiments.harness.study.axes import file_name
from experiments.harness.study.summary import Curve, Key
from experiments.harness.study.training_noise import MOST_BATCHES, training_noise
from experiments.harness.workdir import provenance, record
from experiments.harness.workdir.checkpoints import Checkpoints, is_new
from experiments.harness.workdir.dependences import MEASUREMENT, RUN
from experiments.harness.workdir.files import plain, read, require_shape, write_npz
from experiments.harness.workdir.metrics import read_metrics

_CURVES = {"validation bits/dim": "validation_bits_per_dim", "loss": "loss"}  # by metrics' names


class Measurement(NamedTuple):
    """What is measured of a cell with one training seed; the fields are those of `Measured`."""

    totals: Float[np.ndarray, "n draws"]
    figures: dict[str, float]
    curves: dict[str, Curve]


def check(config: ConfigDict) -> None:
    """Raises ConfigError for the settings of a cell that can't be measured; compiles nothing."""
    samples = "quality" in config.ablate.measures
    checks.check(config, "ablate", *(("sample",) if samples else ()))
    definition = define_model(config)
    memory.check_memory(config, definition.image_shape, "ablate")
    devices.check_batch("config.evaluate.batch_size", config.evaluate.batch_size)
    splits.check_split(config, config.ablate.split)
    if config.ablate.num_timesteps:
        check_levels(config, definition, "ablate.num_timesteps")
    if samples:
        require_grey_levels(
            definition, "ablate.measures", config.ablate.measures, "leave out quality"
        )
        sampler.check(config, definition)
        quality.check(config)


def is_trained(config: ConfigDict, directory: epath.PathLike) -> bool:
    """Whether a work directory holds the finished training of a config."""
    if is_new(directory):
        return False
    recorded = record.recorded_config(directory)
    if recorded is None or provenance.differences(RUN, recorded, config):
        return False
    with Checkpoints(directory, read_only=True) as checkpoints:
        last = checkpoints.latest_step()
        return last >= config.train.num_steps and not checkpoints.was_interrupted(last)


def load(key: Key, config: ConfigDict, directory: epath.PathLike) -> Measurement | None:
    """The measurement of a cell; None if there is none of the present settings and weights.

    Args:
      key: the cell.
      config: its config; `seed` is the one of the evaluation.
      directory: the work directory of its network, whose training is finished.
    """
    path = _path(key, directory)
    if not path.exists():
        return None
    with Checkpoints(directory, read_only=True) as checkpoints:
        step = checkpoints.choose(config.ablate.checkpoint)
    wanted = _identity(config, step, directory)

    def parse(saved):
        if not provenance.is_current(path, saved, wanted):
            return None
        content = json.loads(str(saved["content"]))
        totals = saved["totals"]
        if totals.ndim != 2 or totals.dtype != np.float64:
            raise ValueError("totals is no matrix of float64")
        figures = {
            str(name): float("nan" if value is None else value)
            for name, value in content["figures"].items()
        }
        curves = {
            str(name): (np.asarray(steps, np.float64), np.asarray(values, np.float64))
            for name, (steps, values) in content["curves"].items()
        }
        for name, (steps, values) in curves.items():
            require_shape(name, steps, values.shape)
        return Measurement(totals, figures, curves)

    return read(path, parse)


def measure(
    key: Key, config: ConfigDict, directory: epath.PathLike, study: epath.PathLike
) -> Measurement:
    """Measures a cell and keeps the result.

    Args:
      key: the cell.
      config: its config; `seed` is the one of the evaluation.
      directory: the work directory of its network.
      study: the study's directory, where the features of sample quality are kept for all cells.

    Raises:
      ConfigError: if the network can't have the Σ_θ of the cell.
    """
    run = trained.load(config, directory, config.ablate.checkpoint)
    figures, metrics = {}, read_metrics(directory)
    if "speed" in config.ablate.measures:
        figures["images_per_second"] = _median(metrics, "images_per_second")
    if "loss_variance" in config.ablate.measures:
        choose = splits.some(MOST_BATCHES * config.train.batch_size)
        examples = splits.load_data(config, "train", choose)
        figures |= training_noise(run, examples, config.ablate.repeats)._asdict()
    if "quality" in config.ablate.measures:
        sampled = run.with_variance(config.sample.variance)._replace(workdir=epath.Path(study))
        distances = quality.sample_quality(sampled)
        for name in ("frechet", "kernel"):
            figures[f"{name}_distance"] = distances[name]
            figures[f"{name}_distance_se"] = distances[f"{name}_mc_se"]
    result = Measurement(_totals(run), figures, _curves(metrics))
    path = _path(key, directory)
    path.parent.mkdir(exist_ok=True)
    content = {"figures": figures, "curves": {k: (x, y) for k, (x, y) in result.curves.items()}}
    identity = _identity(config, run.step, directory)
    arrays = {"identity": json.dumps(identity), "content": json.dumps(plain(content))}
    write_npz(path, totals=result.totals, **arrays)
    return result


def _path(key: Key, directory: epath.PathLike) -> epath.Path:
    return epath.Path(directory) / MEASUREMENT / f"{file_name(key)}.npz"


def _identity(config: ConfigDict, step: int, directory: epath.PathLike) -> dict[str, Any]:
    data = splits.fingerprints(config)
    return provenance.identity(MEASUREMENT, config, step, directory, data=data)


def _totals(run: Run) -> Float[np.ndarray, "n draws"]:
    """The bound of every example and draw, in nats."""
    config = run.config
    definition = run.with_variance(config.evaluate.variance).definition
    dataset = splits.load_measured(config, config.ablate.split)
    subject = subject_of(config, definition, run.params, dataset)
    num_timesteps = config.ablate.num_timesteps or definition.levels.num_timesteps
    choice = Choice(definition.schedule.levels(num_timesteps), definition.variance)
    key = (num_timesteps, "")
    return paired.measure_totals(subject, {key: choice}, config.ablate.draws)[key]


def _curves(metrics: list[Mapping[str, Any]]) -> dict[str, Curve]:
    """The learning curves that the log has."""
    curves = {}
    for name, entry in _CURVES.items():
        points = [(line["step"], line[entry]) for line in metrics if line.get(entry) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            curves[name] = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    return curves


def _median(metrics: list[Mapping[str, Any]], name: str) -> float:
    values = [line[name] for line in metrics if line.get(name) is not None]
    return statistics.median(values) if values else float("nan")
