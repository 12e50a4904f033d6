"""What sample quality is measured in: functions from images to feature vectors.

To add one, write a function (config, directory) -> Features and list it in `FEATURES`. It may keep
what it needs in the directory, as the classifier keeps its weights.
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
      name: tells these features from others, their weights included.
      of: uint8 [n, h, w, c] of one size -> float32 [n, f], on the device.
    """

    name: str
    of: Callable[[UInt8[Array, "n h w c"]], Float[Array, "n f"]]


def pixels(config: ConfigDict, directory: epath.Path) -> Features:
    """Grey levels as they are, scaled to [0, 1]."""
    del directory
    highest = splits.describe_data(config, "train").num_levels - 1
    return Features("pixels", lambda images: images.reshape(len(images), -1) / jnp.float32(highest))


def classifier(config: ConfigDict, directory: epath.Path) -> Features:
    """The last hidden layer of a small classifier, trained on the training split on first use.

    Scaled to a variance of one there, on the average over features: the kernel distance depends on
    the scale.

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
    told = fingerprint(images, labels, config.quality.classifier.to_dict(), shapes)
    path = directory / f"classifier_{told}.npz"

    def parse(saved):
        flat = {tuple(name.split("/")): saved[name] for name in saved}
        scale, params = require_shape("scale", flat["scale",], ()), unflatten_dict(flat)["params"]
        jax.tree.map(functools.partial(require_shape, "a parameter"), params, shapes["params"])
        return params, scale

    if (saved := read(path, parse)) is not None:
        params, scale = saved
    else:
        params = _train(network, images, labels, highest, config.quality.classifier)
        found = jax.jit(network.apply)({"params": params}, _scaled(images, highest))[1]
        scale = np.sqrt(np.asarray(found, np.float64).var(axis=0).mean())
        flat = flatten_dict({"params": jax.device_get(params), "scale": scale})
        directory.mkdir(parents=True, exist_ok=True)
        write_npz(path, **{"/".join(name): value for name, value in flat.items()})

    @jax.jit
    def of(images):
        return network.apply({"params": params}, _scaled(images, highest))[1] / jnp.float32(scale)

    return Features(f"classifier {told}", of)


FEATURES: dict[str, Callable[[ConfigDict, epath.Path], Features]] = {
    "classifier": classifier,
    "pixels": pixels,
}
OF_DATA = {"digits": "classifier"}
"""Which features a set has unless told otherwise; pixels for all others."""


def choose(config: ConfigDict, directory: epath.Path) -> Features:
    """The features that `quality.features` names, or the data set's own."""
    return FEATURES[name_of(config)](config, directory)


def name_of(config: ConfigDict) -> str:
    """The name in FEATURES."""
    return config.quality.features or OF_DATA.get(config.data.name, "pixels")


def feature_batches(
    features: Features, images: UInt8[np.ndarray, "n h w c"]
) -> Iterator[Float[np.ndarray, "_ f"]]:
    """The features of every image exactly once, as float64 host arrays [≤ BATCH, f]."""
    n = len(images)
    return batch_results(lambda index: features.of(images[index]), n, min(BATCH, n))


def _scaled(images: Array, highest: int) -> Array:
    """Grey levels to [−1, 1]."""
    return images.astype(jnp.float32) * (2 / highest) - 1


def _initial(network: Classifier, images: np.ndarray, highest: int, seed: int) -> Any:
    """Untrained parameters."""
    return network.init(jax.random.key(seed), _scaled(images[:1], highest))["params"]


def _train(
    network: Classifier, images: np.ndarray, labels: np.ndarray, highest: int, of: ConfigDict
) -> Any:
    """Parameters after Adam on the cross-entropy, images shifted by up to a pixel each way."""
    optimizer = optax.adam(optax.cosine_decay_schedule(of.learning_rate, of.num_steps))
    params = _initial(network, images, highest, of.seed)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = images.shape[1:3]

    @jax.jit
    def step(params, opt_state, batch, label):
        def loss(params):
            logits = network.apply({"params": params}, _scaled(batch, highest))[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state, rng = optimizer.init(params), np.random.default_rng(of.seed)
    steps = range(of.num_steps)
    with progress(of.num_steps, "train classifier", "step", delay=2, leave=False) as bar:
        for number in steps:
            index = order.batch_indices(of.seed, number, len(images), of.batch_size)
            top, left = rng.integers(0, 3, 2)
            batch = padded[index, top : top + height, left : left + width]
            params, opt_state = step(params, opt_state, batch, labels[index])
            bar.update()
    return params
