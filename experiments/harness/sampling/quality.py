"""How close samples are to the data: distances between features, with their standard errors."""

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
from experiments.harness.sampling.draw import Drawer
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
    """What samples are held against.

    Attributes:
      features: the feature function.
      moments: of every image of the split.
      some: features of the first `quality.max_pairs` images of it.
    """

    features: Features
    moments: Moments
    some: Float[np.ndarray, "n f"]


class Quality(NamedTuple):
    """The distances of a set of samples from the data, in the units of the features.

    The errors are over the samples drawn, with the data fixed.

    Attributes:
      num_samples: how many were drawn.
      frechet: the Fréchet distance, biased upwards at small numbers of samples.
      frechet_mc_se: its standard error.
      kernel: the kernel distance, unbiased.
      kernel_mc_se: its standard error.
      precision: share of the samples that look like data.
      recall: share of the data that samples look like.
    """

    num_samples: int
    frechet: float
    frechet_mc_se: float
    kernel: float
    kernel_mc_se: float
    precision: float
    recall: float


def reference(config: ConfigDict, workdir: epath.PathLike) -> Reference:
    """The features and statistics of `quality.split`, worked out once for a work directory."""
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


def quality(
    config: ConfigDict, images: UInt8[np.ndarray, "n h w c"], against: Reference
) -> Quality:
    """The quality of samples, as grey levels: every one of them counts once."""
    moments, some = _measure(against.features, images, config.quality.max_pairs)
    kernel = kernel_distance(against.some, some)
    # Of all samples where the error is worked out from some of them.
    frechet_se = frechet_mc_se(against.moments, some) * np.sqrt(len(some) / len(images))
    shares = precision_recall(against.some, some, config.quality.neighbors)
    return Quality(
        num_samples=len(images),
        frechet=frechet_distance(against.moments, moments),
        frechet_mc_se=float(frechet_se),
        kernel=kernel.mean,
        kernel_mc_se=kernel.mc_se,
        precision=shares.precision,
        recall=shares.recall,
    )


def of_samples(run: Run) -> dict[str, Any]:
    """The quality of `quality.num_samples` samples by the config's sampler."""
    config = run.config
    against = reference(config, run.workdir)
    levels = run.levels(config.sample.num_timesteps)
    made = Drawer(config, run.definition)(run.params, levels, config.quality.num_samples)
    images = np.asarray(run.definition.quantization.to_level(made.x_0), np.uint8)
    return {
        **quality(config, images, against)._asdict(),
        "features": against.features.name,
        "split": config.quality.split,
        "sampler": config.sample.sampler,
        "num_timesteps": levels.num_timesteps,
        "network_evaluations": int(made.evaluations.sum()),
    }


def _measure(
    features: Features, images: np.ndarray, limit: int
) -> tuple[Moments, Float[np.ndarray, "n f"]]:
    """Moments over all images, and the features of some that stand for them."""
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


def line(of: dict[str, Any]) -> str:
    """A quality for people."""
    return (
        f"Fréchet distance {of['frechet']:.4f} ± {of['frechet_mc_se']:.4f}, "
        f"kernel distance {of['kernel']:.5f} ± {of['kernel_mc_se']:.5f}, "
        f"precision {of['precision']:.3f}, recall {of['recall']:.3f} "
        f"({of['num_samples']} samples by {of['sampler']} at {of['num_timesteps']} levels, "
        f"{of['network_evaluations']:,} network evaluations; {of['features']}, {of['split']})"
    )
