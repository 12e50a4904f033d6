"""Configs of large sets: they build, and their networks are the published ones."""

import importlib
import math
import pathlib

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import evaluate, train
from experiments.harness.data import splits, stream
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.params import abstract_params
from tests.mock_cifar10 import mock_tfds


def num_parameters(definition) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(definition)))


def test_vdm_network_has_as_many_parameters_as_published():
    config = importlib.import_module("configs.cifar10_vdm").get_config()
    with mock_tfds(num_examples=200):
        train.check(config)
        evaluate.check(config)
        # 30.6 M, of which the learned schedule has a few hundred.
        assert abs(num_parameters(define_model(config)) - 30.6e6) < 0.05e6


@pytest.mark.parametrize(("name", "size"), [("imagenet32", 32), ("imagenet64", 64)])
def test_imagenet_is_found_and_streamed(name, size, monkeypatch):
    config = importlib.import_module(f"configs.{name}").get_config()
    asked = []

    class Images:
        """As many images as the set has, all of them black."""

        def __len__(self):
            return 1_281_149 - 10_000

        def __iter__(self):
            yield {"image": np.zeros((size, size, 3), np.uint8)}

    builder = type(tfds.builder(config.data.name))
    monkeypatch.setattr(
        builder, "as_data_source", lambda self, split: asked.append(split) or Images()
    )
    train.check(config)
    evaluate.check(config)
    assert set(asked) == {"train[:-10000]", "train[-10000:]", "validation"}
    assert stream.is_streamed(config.data, splits.describe_data(config, "train"))


@pytest.mark.parametrize("name", ["photos", "fashion_mnist"])
def test_small_sets_are_found_and_held_in_memory(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    if name == "photos":
        pytest.importorskip("skimage", exc_type=ImportError)
    elif not pathlib.Path(config.data.data_dir).is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    train.check(config)
    evaluate.check(config)
    assert not stream.is_streamed(config.data, splits.describe_data(config, "train"))
