"""Features for sample quality: functions from images to feature vectors.

To add one, write a function (config, directory) -> Features and list it in `FEATURES`. It may save
files in the directory, as the classifier saves its weights.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from diffusion.schedules import Array
from experiments.harness.data import order, splits
from experiments.harness.data.batches import batch_results
from experiments.harness.errors import ConfigError
from experiments.harness.processes.progress import progress
from experiments.harness.workdir.files import read, require_shape, write_npz
from experiments.harness.workdir.provenance import fingerprint
from models.classifier import Classifier

BATCH = 500  # images at once


class Features(NamedTuple):
    """A feature function.

    Attributes:
      name: identifies the features, including their weights.
      function: uint8 [n, h, w, c] -> float32 [n, f], on the device.
    """

    name: str
    function: Callable[[UInt8[Array, "n h w c"]], Float[Array, "n f"]]


def pixels(config: ConfigDict, directory: epath.Path) -> Features:
    """Grey levels as they are, scaled to [0, 1]."""
    del directory
    highest = splits.describe_data(config, "train").num_levels - 1
    return Features("pixels", lambda images: images.reshape(len(images), -1) / jnp.float32(highest))


def classifier(config: ConfigDict, directory: epath.Path) -> Features:
    """The last hidden layer of a small classifier, trained on the training split on first use.

    Scaled there to a variance of one, averaged over features, because the kernel distance depends
    on the scale.

    Raises:
      ConfigError: if the set has no labels.
    """
    source = splits.describe_data(config, "train")
    if not source.num_classes:
        raise ConfigError(
            f"config.quality.features = 'classifier' needs labels, which config.data.name = "
            f"{config.data.name!r} has not; use pixels"
        )
    images, labels = source.read()
    network = Classifier(source.num_classes)
    highest = source.num_levels - 1
    shapes = jax.tree.map(jnp.shape, _initial(network, images, highest, seed=0))
    digest = fingerprint(images, labels, config.quality.classifier.to_dict(), shapes)
    path = directory / f"classifier_{digest}.npz"

    def parse(saved):
        flat = {tuple(name.split("/")): saved[name] for name in saved}
        scale, params = require_shape("scale", flat["scale",], ()), unflatten_dict(flat)["params"]
        jax.tree.map(functools.partial(require_shape, "a parameter"), params, shapes)
        return params, scale

    if (saved := read(path, parse)) is not None:
        params, scale = saved
    else:
        params = _train(network, images, labels, highest, config.quality.classifier)
        hidden = jax.jit(network.apply)({"params": params}, _scaled(images, highest))[1]
        scale = np.sqrt(np.asarray(hidden, np.float64).var(axis=0).mean())
        flat = flatten_dict({"params": jax.device_get(params), "scale": scale})
        directory.mkdir(parents=True, exist_ok=True)
        write_npz(path, **{"/".join(name): value for name, value in flat.items()})

    @jax.jit
    def features(images):
        return network.apply({"params": params}, _scaled(images, highest))[1] / jnp.float32(scale)

    return Features(f"classifier {digest}", features)


FEATURES: dict[str, Callable[[ConfigDict, epath.Path], Features]] = {
    "classifier": classifier,
    "pixels": pixels,
}
DEFAULTS = {"digits": "classifier"}
"""The features of a data set if `quality.features` is empty; pixels for all others."""


def choose(config: ConfigDict, directory: epath.Path) -> Features:
    """The features that `quality.features` names, or the data set's own."""
    return FEATURES[name_of(config)](config, directory)


def name_of(config: ConfigDict) -> str:
    """The name in FEATURES."""
    return config.quality.features or DEFAULTS.get(config.data.name, "pixels")


def feature_batches(
    features: Features, images: UInt8[np.ndarray, "n h w c"]
) -> Iterator[Float[np.ndarray, "_ f"]]:
    """The features of every image exactly once, as float64 host arrays [≤ BATCH, f]."""
    n = len(images)
    return batch_results(lambda index: features.function(images[index]), n, min(BATCH, n))


def _scaled(images: Array, highest: int) -> Array:
    """Grey levels to [−1, 1]."""
    return images.astype(jnp.float32) * (2 / highest) - 1


def _initial(network: Classifier, images: np.ndarray, highest: int, seed: int) -> Any:
    """Untrained parameters."""
    return network.init(jax.random.key(seed), _scaled(images[:1], highest))["params"]


def _train(
    network: Classifier, images: np.ndarray, labels: np.ndarray, highest: int, settings: ConfigDict
) -> Any:
    """Parameters after Adam on the cross-entropy, images shifted by up to a pixel each way."""
    optimizer = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.num_steps))
    params = _initial(network, images, highest, settings.seed)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = images.shape[1:3]

    @jax.jit
    def step(params, opt_state, batch, label):
        def loss(params):
            logits = network.apply({"params": params}, _scaled(batch, highest))[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state, rng = optimizer.init(params), np.random.default_rng(settings.seed)
    steps = range(settings.num_steps)
    with progress(settings.num_steps, "train classifier", "step", delay=2, leave=False) as bar:
        for number in steps:
            index = order.batch_indices(settings.seed, number, len(images), settings.batch_size)
            top, left = rng.integers(0, 3, 2)
            batch = padded[index, top : top + height, left : left + width]
            params, opt_state = step(params, opt_state, batch, labels[index])
            bar.update()
    return params
