"""configs/cifar10.py: DDPM's network and schedule at full size, and its run at a small one."""

import jax
import matplotlib.image
import numpy as np
import pytest

from configs import cifar10
from experiments.evaluate import evaluate
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.params import abstract_params, init_params
from experiments.train import train
from tests.experiments import tiny
from tests.mock_cifar10 import mock_tfds

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def small():
    """A few steps at a sixteenth of its width, half its depth and T = 4; all else as it is."""
    config = cifar10.get_config()
    config.schedule.num_timesteps = 4
    config.model.unet.update(channels=8, channel_multipliers=(1, 2), num_groups=4, num_res_blocks=1)
    config.train.update(
        batch_size=4,
        num_steps=3,
        warmup_steps=1,
        log_every=1,
        checkpoint_every=2,
        sample_every=3,
        sample_timesteps=2,
        validation_timesteps=2,
    )
    config.evaluate.update(batch_size=4, chunk_size=2, replicates=2)
    config.sample.batch_size = 4
    return config


def test_at_full_width_it_is_the_network_of_ddpm():
    with mock_tfds(num_examples=4):
        definition = define_model(cifar10.get_config())
    leaves = jax.tree.leaves(abstract_params(definition))
    assert sum(leaf.size for leaf in leaves) == 35_746_307
    assert definition.image_shape == (32, 32, 3)
    assert definition.quantization.num_levels == 256
    # β from 10⁻⁴ to 0.02, and what the network is fed at level t is t − 1.
    np.testing.assert_allclose(
        definition.levels.beta[1:], np.linspace(1e-4, 0.02, 1000), rtol=1e-10
    )
    log_snr = definition.levels.step(np.arange(1, 1001)).log_snr
    np.testing.assert_array_equal(definition.network.timestep_of(log_snr), np.arange(1000))


def test_it_trains_draws_and_evaluates(tmp_path):
    config = small()
    assert config.data.flip
    with mock_tfds(num_examples=8):
        start = init_params(define_model(config), config.seed)
        state = train(config, tmp_path)
        result = evaluate(config, tmp_path)

    assert int(state.step) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    # The first step is at a rate of zero; the last layer, zero at first, has moved since.
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, start)
    assert moved["network"]["conv_out"]["kernel"] > 0
    lines = tiny.metrics(tmp_path)
    losses = [line["loss"] for line in lines if "loss" in line]
    # L_simple of a network that predicts zero is the mean of ε², over 4 × 3072 of them: 1, and
    # √(2/12288) = 0.013 the standard deviation. Two steps of 2e-4 or less change little.
    assert losses == pytest.approx([1.0, 1.0, 1.0], abs=0.06)
    assert [line["step"] for line in lines if "validation_bits_per_dim" in line] == [2, 3]

    assert result["num_examples"] == 8
    assert result["num_timesteps"] == 4
    parts = result["prior"] + result["diffusion"] + result["reconstruction"]
    assert parts == pytest.approx(result["bits_per_dim"], rel=1e-6)
    assert np.isfinite(result["bits_per_dim"])
    # Grey levels uniform on 255 of 256 cannot be had for less than their entropy.
    assert result["bits_per_dim"] > np.log2(255)

    picture = matplotlib.image.imread(tmp_path / "samples" / "step_00000003.png")
    # Four samples of 32 × 32, at 2 × 2 pixels a pixel, in colour.
    assert picture.shape == (129, 129, 3)
