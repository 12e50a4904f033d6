"""Weights of diffusers' `UNet2DModel` as parameters of our `UNet`. Torch is not needed."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from models.unet import UNet

# Our names of the layers of a block, with those of diffusers.
RES_BLOCK = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "embedding": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
}
ATTENTION = {
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Axes of convolutions from [out, in, h, w] to [h, w, in, out], and of matrices from [out, in].
AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}

# Options of `UNet2DModel` that change what it computes but no name and no shape of a weight.
OUR_OPTIONS = {
    "act_fn": "silu",
    "add_attention": True,
    "attention_head_dim": None,  # a single head
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 0,
    "downsample_type": "conv",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "norm_eps": 1e-6,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
# diffusers' defaults that differ from these: a config without the option has the default.
THEIR_DEFAULTS = {
    "attention_head_dim": 8,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
}
# The weights show these, or they change nothing that is computed.
FREE_OPTIONS = {
    "block_out_channels",
    "down_block_types",
    "dropout",
    "in_channels",
    "layers_per_block",
    "num_train_timesteps",
    "out_channels",
    "sample_size",
    "time_embedding_dim",
    "up_block_types",
}


def check_options(config: Mapping[str, Any], network: UNet) -> None:
    """Raises ValueError unless a `UNet2DModel` of this config computes what our network does."""
    ours = OUR_OPTIONS | {"norm_num_groups": network.num_groups}
    theirs = {name: value for name, value in config.items() if not name.startswith("_")}
    theirs = THEIR_DEFAULTS | theirs
    if unknown := theirs.keys() - ours.keys() - FREE_OPTIONS:
        raise ValueError(
            f"the config of the UNet2DModel has the unknown option {min(unknown)}; the parameters "
            "of such a network cannot be used"
        )
    if wrong := [name for name in ours if name in theirs and theirs[name] != ours[name]]:
        options = (f"{name} = {theirs[name]!r} (ours: {ours[name]!r})" for name in wrong)
        raise ValueError(f"the UNet2DModel computes otherwise: {', '.join(options)}")


def module_names(num_levels: int, num_res_blocks: int) -> dict[str, str]:
    """Our name and diffusers' name of every layer that such a U-Net can have.

    Some networks lack some of these layers: shortcuts, and attention outside of the middle. Their
    up blocks are numbered from the smallest resolution, ours by the resolution's level.
    """
    blocks = {"middle_block_0": "mid_block.resnets.0", "middle_block_1": "mid_block.resnets.1"}
    attentions = {"middle_attention_0": "mid_block.attentions.0"}
    names = {
        "embedding_1": "time_embedding.linear_1",
        "embedding_2": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    for level in range(num_levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{num_levels - 1 - level}"
        names[f"down_{level}_downsample/conv"] = f"{down}.downsamplers.0.conv"
        names[f"up_{level}_upsample/conv"] = f"{up}.upsamplers.0.conv"
        for i in range(num_res_blocks):
            blocks[f"down_{level}_block_{i}"] = f"{down}.resnets.{i}"
            attentions[f"down_{level}_attention_{i}"] = f"{down}.attentions.{i}"
        for i in range(num_res_blocks + 1):
            blocks[f"up_{level}_block_{i}"] = f"{up}.resnets.{i}"
            attentions[f"up_{level}_attention_{i}"] = f"{up}.attentions.{i}"
    for parents, layers in ((blocks, RES_BLOCK), (attentions, ATTENTION)):
        for our_parent, parent in parents.items():
            names |= {f"{our_parent}/{ours}": f"{parent}.{layers[ours]}" for ours in layers}
    return names


def params_from_unet2d(
    state_dict: Mapping[str, Any],
    config: Mapping[str, Any],
    network: UNet,
    image_shape: Sequence[int],
) -> dict[str, Any]:
    """The weights of a `UNet2DModel` as parameters of a network of the same architecture.

    The architecture is that of google/ddpm-cifar10-32, with the options OUR_OPTIONS. The network
    needs `timestep_of=ddpm_timestep(…)` of the levels that the weights were trained on.

    Args:
      state_dict: numpy arrays by name.
      config: the options of the model, `model.config` or its config.json.
      network: the network.
      image_shape: (height, width, channels) of its images.

    Returns:
      The collection `params`, in float32.

    Raises:
      ValueError: if an option does not fit, a weight is missing or left over, or a shape differs.
    """
    check_options(config, network)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    log_snr = jax.ShapeDtypeStruct((1,), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images, log_snr)["params"]
    modules = module_names(len(network.channel_multipliers), network.num_res_blocks)
    names, params = {}, {}
    for path in flatten_dict(shapes, sep="/"):
        module, leaf = path.rsplit("/", 1)
        names[path] = f"{modules[module]}.{LEAVES[leaf]}"
    differences = set(names.values()) ^ set(state_dict)
    if differences:
        raise ValueError(f"weights missing or left over: {', '.join(sorted(differences)[:6])}")
    for path, shape in flatten_dict(shapes, sep="/").items():
        weight = np.asarray(state_dict[names[path]], np.float32)
        params[path] = jnp.asarray(weight.transpose(AXES[weight.ndim]))
        if params[path].shape != shape.shape:
            raise ValueError(
                f"{names[path]} has shape {params[path].shape} in our order of axes; the network "
                f"needs {shape.shape}"
            )
    return unflatten_dict(params, sep="/")
