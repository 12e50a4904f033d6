"""Our U-Net against diffusers' `UNet2DModel` with the same weights."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.diffusers_unet import ddpm_cifar10
from models.diffusers_weights import (
    DEFAULTS,
    params_from_unet2d,
    unet2d_from_params,
    unet2d_options,
    unet_settings,
)
from models.foreign import timestep
from models.unet import UNet

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LEVEL_LOG_SNRS = np.log(ALPHA_BAR / (1 - ALPHA_BAR))

DDPM = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
NARROW = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
# Each differs from the others in what is computed.
ARCHITECTURES = {
    "google/ddpm": DDPM,
    "diffusers' defaults": {},
    "a tutorial's": {  # of diffusers' course, narrower
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 2,
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    },
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "attention_head_dim": 4},
    "scale, shift and norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "no attention": {
        "add_attention": False,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    },
    "learned variance, wide images": {"sample_size": (4, 8), "in_channels": 3, "out_channels": 6},
    "guided diffusion's": {  # ADM: Dhariwal and Nichol (2021)
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": (8, 16, 16),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 4,
        "attn_norm_num_groups": 4,
        "num_class_embeds": 4,
    },
    "classes": {"num_class_embeds": 4},
    "attention on one way, heads with a rest, no multiples": {
        "block_out_channels": (8, 12, 20),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
        "mid_block_scale_factor": 2**0.5,
        "attention_head_dim": 7,
    },
    "centred, one resolution, epsilon": {
        "center_input_sample": True,
        "norm_eps": 0.1,
        "block_out_channels": (12,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
        "attention_head_dim": 3,
    },
}


def moved(model, scale: float = 0.05):
    """The model with all weights random, also those that start at zero or one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape)
    return model.eval()


def theirs(name: str):
    """diffusers' network of this architecture, at tiny width."""
    torch.manual_seed(0)
    return moved(diffusers.UNet2DModel(**NARROW | ARCHITECTURES[name]))


def image_shape_of(model) -> tuple[int, int, int]:
    size = model.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height, width, model.config.in_channels


def ours(model) -> UNet:
    """Our network of the same architecture, from what config.json has."""
    config = json.loads(model.to_json_string())
    height, _, channels = image_shape_of(model)
    settings = unet_settings(config, height)
    out, classes = config["out_channels"], (config["num_class_embeds"] or 1) - 1
    out_channels = None if out == channels else out
    timestep_of = timestep(LEVEL_LOG_SNRS)
    return UNet(**settings, out_channels=out_channels, num_classes=classes, timestep_of=timestep_of)


def numpy_weights(model) -> dict[str, np.ndarray]:
    return {name: weight.numpy() for name, weight in model.state_dict().items()}


def outputs(model, timestep: int) -> tuple[np.ndarray, np.ndarray]:
    """Their output and ours for the same two images; the second of a network with classes has
    another label."""
    network, image_shape = ours(model), image_shape_of(model)
    params = params_from_unet2d(numpy_weights(model), network, image_shape)
    x_t = np.random.default_rng(0).normal(size=(2, *image_shape)).astype(np.float32)
    labels = np.array([1, 3]) if network.num_classes else None
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(x_t.transpose(0, 3, 1, 2)),
            timestep,
            class_labels=None if labels is None else torch.from_numpy(labels),
        ).sample
    log_snr = np.full(2, LEVEL_LOG_SNRS[timestep], np.float32)
    return theirs.numpy().transpose(0, 2, 3, 1), jax.jit(network.apply)(
        {"params": params}, x_t, log_snr, labels
    )


def assert_close(expected, actual):
    """To 1e-4 of the largest output: float32 rounding, added up over some 60 layers, is 1e-6."""
    assert np.abs(expected).std() > 0.1, "an output near zero would prove nothing"
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_computes_what_theirs_does(name):
    assert_close(*outputs(theirs(name), 500))


@pytest.mark.parametrize("timestep", [0, 1, 999])
def test_the_noise_level_is_their_timestep(timestep):
    assert_close(*outputs(theirs("google/ddpm"), timestep))


def test_ddpms_cifar10_network_computes_what_theirs_does():
    assert_close(*outputs(moved(ddpm_cifar10(), 0.02), 500))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_and_options_come_back(name):
    """Bit for bit; an option comes back as another one that means the same."""
    model = theirs(name)
    network, weights = ours(model), numpy_weights(model)
    params = params_from_unet2d(weights, network, image_shape_of(model))
    back = unet2d_from_params(params, network)
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[key], weights[key]) for key in weights)
    height, _, _ = image_shape_of(model)
    options = unet2d_options(network, image_shape_of(model))
    assert unet_settings(options, height) == unet_settings(model.config, height)
    diffusers.UNet2DModel(**options).load_state_dict(model.state_dict())


def test_names_of_older_versions_are_read():
    model = theirs("google/ddpm")
    network, image_shape = ours(model), image_shape_of(model)
    weights = numpy_weights(model)
    old = weights
    for new, former in (("to_q", "query"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        old = {key.replace(f".{new}.", f".{former}."): value for key, value in old.items()}
    assert old.keys() != weights.keys()
    jax.tree.map(
        np.testing.assert_array_equal,
        params_from_unet2d(old, network, image_shape),
        params_from_unet2d(weights, network, image_shape),
    )


def test_weights_that_do_not_fit_are_named():
    model = theirs("google/ddpm")
    weights, network, image_shape = numpy_weights(model), ours(model), image_shape_of(model)
    missing = {name: weight for name, weight in weights.items() if name != "conv_in.bias"}
    for changed, message in (
        (missing, "missing or left over: conv_in.bias"),
        (weights | {"class_embedding.weight": np.zeros((10, 32))}, "class_embedding.weight"),
        (weights | {"conv_in.bias": np.zeros(9)}, r"conv_in.bias has shape \(9,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            params_from_unet2d(changed, network, image_shape)


def test_the_defaults_are_diffusers():
    """A new option of diffusers, or another default, must be looked at."""
    parameters = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    assert defaults == DEFAULTS


def test_the_parameters_are_those_that_init_makes():
    model = theirs("classes")
    network, image_shape = ours(model), image_shape_of(model)
    params = params_from_unet2d(numpy_weights(model), network, image_shape)
    expected = jax.eval_shape(
        network.init, jax.random.key(0), jnp.zeros((1, *image_shape)), jnp.zeros(1)
    )["params"]
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
