"""Our U-Net against diffusers' `UNet2DModel` with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.diffusers_unet import ddpm_cifar10
from models.diffusers_weights import params_from_unet2d
from models.unet import UNet, ddpm_timestep

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LEVEL_LOG_SNRS = np.log(ALPHA_BAR / (1 - ALPHA_BAR))
IMAGE_SHAPE = (32, 32, 3)


def theirs(channels: int, num_groups: int):
    """diffusers' network with every weight random, those that it sets to zero or one too."""
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
    """Weights of a narrow network of theirs, and ours to fill."""
    return numpy_weights(theirs(8, 4)), ours(8, 4)


def test_ddpms_cifar10_network_computes_what_theirs_does():
    """To 1e-4 of the largest output: float32 rounding, added up over some 60 layers, is 1e-6."""
    model, network = theirs(128, 32), ours(128, 32)
    params = params_from_unet2d(numpy_weights(model), network, IMAGE_SHAPE)
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


def test_names_of_old_files_give_the_same_parameters(narrow):
    weights, network = narrow
    spelling = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, weight in weights.items():
        for new_name, old_name in spelling.items():
            name = name.replace(f".{new_name}.", f".{old_name}.")
        old[name] = weight
    assert old.keys() != weights.keys()
    jax.tree.map(
        np.testing.assert_array_equal,
        params_from_unet2d(old, network, IMAGE_SHAPE),
        params_from_unet2d(weights, network, IMAGE_SHAPE),
    )


def test_weights_that_do_not_fit_are_named(narrow):
    weights, network = narrow
    with pytest.raises(ValueError, match=r"1 missing \['conv_in.bias'\]"):
        params_from_unet2d(
            {name: weight for name, weight in weights.items() if name != "conv_in.bias"},
            network,
            IMAGE_SHAPE,
        )
    with pytest.raises(ValueError, match=r"1 left over \['class_embedding.weight'\]"):
        params_from_unet2d(
            weights | {"class_embedding.weight": np.zeros((10, 32))}, network, IMAGE_SHAPE
        )
    twice = weights | {"mid_block.attentions.0.query.bias": np.zeros(16)}
    with pytest.raises(ValueError, match="1 given under two names"):
        params_from_unet2d(twice, network, IMAGE_SHAPE)
    with pytest.raises(ValueError, match=r"conv_in.bias has shape \(9,\)"):
        params_from_unet2d(weights | {"conv_in.bias": np.zeros(9)}, network, IMAGE_SHAPE)


def test_the_parameters_are_those_that_init_makes(narrow):
    weights, network = narrow
    params = params_from_unet2d(weights, network, IMAGE_SHAPE)
    made = jax.eval_shape(
        network.init, jax.random.key(0), jnp.zeros((1, *IMAGE_SHAPE)), jnp.zeros(1)
    )["params"]
    assert jax.tree.structure(params) == jax.tree.structure(made)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
