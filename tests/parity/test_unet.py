"""Our U-Net against diffusers' `UNet2DModel` with the same weights."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.diffusers_unet import ddpm_cifar10
from models.diffusers_weights import (
    FREE_OPTIONS,
    OUR_OPTIONS,
    THEIR_DEFAULTS,
    params_from_unet2d,
)
from models.unet import UNet, ddpm_timestep

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LEVEL_LOG_SNRS = np.log(ALPHA_BAR / (1 - ALPHA_BAR))
IMAGE_SHAPE = (32, 32, 3)


def theirs(channels: int, num_groups: int):
    """diffusers' network with all weights random, also those that start at zero or one."""
    model = ddpm_cifar10(channels, num_groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    return model


def ours(channels: int, num_groups: int) -> UNet:
    return UNet(channels, num_groups=num_groups, timestep_of=ddpm_timestep(LEVEL_LOG_SNRS))


def numpy_weights(model) -> dict[str, np.ndarray]:
    return {name: weight.numpy() for name, weight in model.state_dict().items()}


@pytest.fixture(scope="module")
def narrow():
    """Weights and config of a narrow network of theirs, and our network of this size."""
    model = theirs(8, 4)
    return numpy_weights(model), model.config, ours(8, 4)


def test_ddpms_cifar10_network_computes_what_theirs_does():
    """To 1e-4 of the largest output: float32 rounding, added up over some 60 layers, is 1e-6."""
    model, network = theirs(128, 32), ours(128, 32)
    params = params_from_unet2d(numpy_weights(model), model.config, network, IMAGE_SHAPE)
    apply = jax.jit(network.apply)
    x_t = np.random.default_rng(0).normal(size=(2, *IMAGE_SHAPE)).astype(np.float32)
    for timestep in (0, 1, 500, 999):
        log_snr = np.full(2, LEVEL_LOG_SNRS[timestep], np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(x_t.transpose(0, 3, 1, 2)), timestep).sample
        expected = expected.numpy().transpose(0, 2, 3, 1)
        actual = apply({"params": params}, x_t, log_snr)
        assert np.abs(expected).std() > 0.1, "an output near zero would prove nothing"
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_weights_that_do_not_fit_are_named(narrow):
    weights, config, network = narrow
    missing = {name: weight for name, weight in weights.items() if name != "conv_in.bias"}
    for changed, message in (
        (missing, "missing or left over: conv_in.bias"),
        (weights | {"class_embedding.weight": np.zeros((10, 32))}, "class_embedding.weight"),
        (weights | {"conv_in.bias": np.zeros(9)}, r"conv_in.bias has shape \(9,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            params_from_unet2d(changed, config, network, IMAGE_SHAPE)


def test_options_that_no_weight_shows_are_compared(narrow):
    """Their default options load by name and shape, and change the output by half of its size."""
    weights, config, network = narrow
    default = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    known = OUR_OPTIONS.keys() | FREE_OPTIONS | {"norm_num_groups"}
    assert default.keys() - {"self"} == known, "diffusers has another option"
    by_default = {name: default[name].default for name in THEIR_DEFAULTS}
    assert by_default == THEIR_DEFAULTS
    same = {name: value for name, value in OUR_OPTIONS.items() if name not in THEIR_DEFAULTS}
    assert {name: default[name].default for name in same} == same
    for changed, message in (
        (dict(config) | {"freq_shift": 0}, r"otherwise: freq_shift = 0 \(ours: 1\)$"),
        (dict(config) | {"norm_num_groups": 8}, r"norm_num_groups = 8 \(ours: 4\)"),
        (dict(config) | {"some_option": 8}, "unknown option some_option"),
        ({}, "attention_head_dim = 8 .*, downsample_padding = 1 .*, flip_sin_to_cos = True"),
    ):
        with pytest.raises(ValueError, match=message):
            params_from_unet2d(weights, changed, network, IMAGE_SHAPE)


def test_the_parameters_are_those_that_init_makes(narrow):
    weights, config, network = narrow
    params = params_from_unet2d(weights, config, network, IMAGE_SHAPE)
    expected = jax.eval_shape(
        network.init, jax.random.key(0), jnp.zeros((1, *IMAGE_SHAPE)), jnp.zeros(1)
    )["params"]
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
