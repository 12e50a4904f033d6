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
    state_dict: Mapping[str, Any], network: UNet, image_shape: Sequence[int]
) -> dict[str, Any]:
    """The weights of a `UNet2DModel` as parameters of a network of the same architecture.

    The architecture is that of google/ddpm-cifar10-32: attention of a single head, biased
    downsampling by a padded convolution, `freq_shift=1`, `flip_sin_to_cos=False`. The network needs
    `timestep_of=ddpm_timestep(…)` of the levels that the weights were trained on.

    Args:
      state_dict: numpy arrays by name.
      network: the network.
      image_shape: (height, width, channels) of its images.

    Returns:
      The collection `params`, in float32.

    Raises:
      ValueError: if a weight is missing or left over, or a shape differs.
    """
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
