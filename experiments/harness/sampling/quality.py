"""Sample quality: distances of samples from the data in a feature space, with standard errors."""

from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from diffusion.statistics.sample_quality import (
    Moments,
    frechet_distance,
    frechet_mc_se,
    kernel_distance,
    precision_recall,
)
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError
from experiments.harness.sampling.draw import Drawer, to_grey_levels
from experiments.harness.sampling.features import (
    Features,
    choose,
    feature_batches,
    name_of,
)
from experiments.harness.setup.trained import Run
from experiments.harness.workdir.files import read, require_shape, write_npz
from experiments.harness.workdir.provenance import fingerprint

DIRECTORY = "quality"  # in the work directory: the classifier, and the statistics of the data


class Reference(NamedTuple):
    """The data with which samples are compared.

    Attributes:
      features: the feature function.
      moments: of the features of every image of the split.
      some: the features of at most `quality.max_pairs` of its images.
    """

    features: Features
    moments: Moments
    some: Float[np.ndarray, "n f"]


class Quality(NamedTuple):
    """The distances of a set of samples from the data, in the units of the features.

    The standard errors are over the samples, with the data fixed.

    Attributes:
      num_samples: the number of samples.
      frechet: the Fréchet distance, biased upwards at small numbers of samples.
      frechet_mc_se: its standard error.
      kernel: the kernel distance, unbiased.
      kernel_mc_se: its standard error.
      precision: share of the samples that lie near data.
      recall: share of the data that lie near samples.
    """

    num_samples: int
    frechet: float
    frechet_mc_se: float
    kernel: float
    kernel_mc_se: float
    precision: float
    recall: float


def reference(config: ConfigDict, workdir: epath.PathLike) -> Reference:
    """The features of `quality.split` and their statistics, computed once for a work directory."""
    directory = epath.Path(workdir) / DIRECTORY
    features = choose(config, directory)
    images = splits.load_data(config, config.quality.split).images
    limit = config.quality.max_pairs
    path = directory / f"reference_{fingerprint(images, features.name, limit)}.npz"
    if (saved := read(path, _parse)) is not None:
        return Reference(features, *saved)
    moments, some = _measure(features, images, limit)
    directory.mkdir(parents=True, exist_ok=True)
    write_npz(path, **moments._asdict(), some=some)
    return Reference(features, moments, some)


def _parse(saved: dict[str, np.ndarray]) -> tuple[Moments, np.ndarray]:
    num_features, num_kept = saved["mean"].size, len(saved["some"])
    return Moments(
        int(saved["count"]),
        require_shape("mean", saved["mean"], (num_features,)),
        require_shape("scatter", saved["scatter"], (num_features, num_features)),
    ), require_shape("some", saved["some"], (num_kept, num_features))


def quality(config: ConfigDict, images: UInt8[np.ndarray, "n h w c"], data: Reference) -> Quality:
    """The quality of samples, given as grey levels; each counts once."""
    moments, some = _measure(data.features, images, config.quality.max_pairs)
    kernel = kernel_distance(data.some, some)
    # The error is computed from some of the samples, and scaled to the number of all.
    frechet_se = frechet_mc_se(data.moments, some) * np.sqrt(len(some) / len(images))
    shares = precision_recall(data.some, some, config.quality.neighbors)
    return Quality(
        num_samples=len(images),
        frechet=frechet_distance(data.moments, moments),
        frechet_mc_se=float(frechet_se),
        kernel=kernel.mean,
        kernel_mc_se=kernel.mc_se,
        precision=shares.precision,
        recall=shares.recall,
    )


def sample_quality(run: Run) -> dict[str, Any]:
    """The quality of `quality.num_samples` samples by the config's sampler."""
    config = run.config
    data = reference(config, run.workdir)
    levels = run.levels(config.sample.num_timesteps)
    samples = Drawer(config, run.definition)(run.params, levels, config.quality.num_samples)
    images = to_grey_levels(run.definition, samples.x_0)
    return {
        **quality(config, images, data)._asdict(),
        "features": data.features.name,
        "split": config.quality.split,
        "sampler": config.sample.sampler,
        "num_timesteps": levels.num_timesteps,
        "network_evaluations": int(samples.evaluations.sum()),
    }


def _measure(
    features: Features, images: np.ndarray, limit: int
) -> tuple[Moments, Float[np.ndarray, "n f"]]:
    """Moments over all images, and the features of a representative subset of at most `limit`."""
    moments, some, seen = None, [], 0
    chosen = np.zeros(len(images), bool)
    chosen[splits.some(limit)(len(images))] = True
    for batch in feature_batches(features, images):
        moments = (moments or Moments.empty(batch.shape[1])).update(batch)
        some.append(batch[chosen[seen : seen + len(batch)]])
        seen += len(batch)
    return moments, np.concatenate(some)


def check(config: ConfigDict) -> None:
    """Raises ConfigError unless the data have the labels and the examples that quality needs."""
    num_examples = splits.check_split(config, config.quality.split).num_examples
    if name_of(config) == "classifier" and not splits.describe_data(config, "train").num_classes:
        raise ConfigError(
            "config.quality.features = 'classifier' needs labels, which config.data.name = "
            f"{config.data.name!r} has not; use pixels"
        )
    if num_examples <= config.quality.neighbors:
        raise ConfigError(
            f"config.quality.neighbors = {config.quality.neighbors}; {config.quality.split} has "
            f"only {num_examples} examples"
        )


def line(result: dict[str, Any]) -> str:
    """The result of `sample_quality` for people."""
    return (
        f"Fréchet distance {result['frechet']:.4f} ± {result['frechet_mc_se']:.4f}, "
        f"kernel distance {result['kernel']:.5f} ± {result['kernel_mc_se']:.5f}, "
        f"precision {result['precision']:.3f}, recall {result['recall']:.3f} "
        f"({result['num_samples']} samples by {result['sampler']} at {result['num_timesteps']} "
        f"levels, {result['network_evaluations']:,} network evaluations; {result['features']}, "
        f"{result['split']})"
    )
