"""Weights of diffusers' `UNet2DModel` as parameters of our `UNet`. Torch is not needed."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from models.unet import UNet

# Ours -> theirs, within a block.
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

# Attention as diffusers spelled it until 2023, and many files on the hub still do -> today.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def module_names(num_levels: int, num_res_blocks: int) -> dict[str, str]:
    """Our name of every layer that such a U-Net can have, with theirs.

    Shortcuts, and attention outside the middle, exist only in some places. Their up blocks are
    numbered from the smallest resolution, ours are named by the resolution's level.
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
    for parents, parts in ((blocks, RES_BLOCK), (attentions, ATTENTION)):
        for ours, theirs in parents.items():
            names |= {f"{ours}/{part}": f"{theirs}.{parts[part]}" for part in parts}
    return names


def params_from_unet2d(
    state_dict: Mapping[str, Any], network: UNet, image_shape: Sequence[int]
) -> dict[str, Any]:
    """A `UNet2DModel`'s weights as the parameters of a network of the same architecture.

    The same architecture is the configuration of google/ddpm-cifar10-32: attention of a single
    head, biased downsampling by a padded convolution, `freq_shift=1`, `flip_sin_to_cos=False`. Run
    it with `timestep_of=ddpm_timestep(…)` on the levels that it was trained on.

    Args:
      state_dict: numpy arrays by name; the attention may have its names of before 2023.
      network: the network to fill.
      image_shape: (height, width, channels) of its images.

    Returns:
      The collection `params`, in float32.

    Raises:
      ValueError: if a parameter is missing, a weight is left over, or a shape differs.
    """
    wanted = jax.eval_shape(
        network.init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
    )["params"]
    wanted = flatten_dict(wanted, sep="/")
    modules = module_names(len(network.channel_multipliers), network.num_res_blocks)
    weights = {_current_name(name): np.asarray(weight) for name, weight in state_dict.items()}
    names = {}
    for path in wanted:
        module, leaf = path.rsplit("/", 1)
        names[path] = f"{modules[module]}.{LEAVES[leaf]}"

    missing = [name for name in names.values() if name not in weights]
    unused = sorted(set(weights) - set(names.values()))
    if missing or unused or len(weights) != len(state_dict):
        raise ValueError(
            f"not the weights of this network: {len(missing)} missing {missing[:3]}, "
            f"{len(unused)} left over {unused[:3]}, "
            f"{len(state_dict) - len(weights)} given under two names"
        )
    params = {path: _to_ours(weights[name]) for path, name in names.items()}
    for path, shape in wanted.items():
        if params[path].shape != shape.shape:
            raise ValueError(
                f"{names[path]} has shape {weights[names[path]].shape}, "
                f"which is {params[path].shape} here; the network needs {shape.shape}"
            )
    return unflatten_dict({path: jnp.asarray(p) for path, p in params.items()}, sep="/")


def _current_name(name: str) -> str:
    """A name in a state dict as diffusers spells it today."""
    module, _, leaf = name.rpartition(".")
    parent, _, layer = module.rpartition(".")
    return f"{parent}.{RENAMED[layer]}.{leaf}" if layer in RENAMED else name


def _to_ours(weight: np.ndarray) -> np.ndarray:
    """Convolutions from [out, in, h, w] to [h, w, in, out], matrices from [out, in]."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(weight.ndim)
    return np.asarray(weight if axes is None else weight.transpose(axes), np.float32)
