"""diffusers' `UNet2DModel`, options and weights, as our `UNet`, and back. Torch is not needed."""

from collections.abc import Iterator, Mapping, Sequence
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
# The names of older versions, as google/ddpm-cifar10-32 has them.
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
LABELS = {"label_embedding": "class_embedding.weight"}
# Axes of convolutions from [out, in, h, w] to [h, w, in, out], and of matrices from [out, in].
AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}

# diffusers' defaults: a config without the option has the default.
DEFAULTS = {
    "act_fn": "silu",
    "add_attention": True,
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "block_out_channels": (224, 448, 672, 896),
    "center_input_sample": False,
    "class_embed_type": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "downsample_padding": 1,
    "downsample_type": "conv",
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "num_train_timesteps": None,
    "out_channels": 3,
    "resnet_time_scale_shift": "default",
    "sample_size": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "upsample_type": "conv",
}
NUMBERS = ("dropout", "freq_shift", "mid_block_scale_factor", "norm_eps")
MAY_BE_NONE = ("attention_head_dim", "mid_block_type", "norm_num_groups")
# The values of an option that our network can express, where it cannot express all.
SUPPORTED = {
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "freq_shift": (0, 1),
    "mid_block_type": ("UNetMidBlock2D",),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_type": ("positional",),
    "upsample_type": ("conv", "resnet"),
}
# Blocks without and with attention. Those of the second form change the resolution by a residual
# block; with attention the options downsample_type and upsample_type say so.
BLOCKS = {
    "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
}
RESAMPLING = ("downsample_type", "upsample_type")


def full_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a `UNet2DModel`, each that is missing with diffusers' default.

    Args:
      config: `model.config` or the content of its config.json.

    Raises:
      ValueError: with one line that names an option which our network cannot express.
    """
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := options.keys() - DEFAULTS.keys():
        raise ValueError(f"the UNet2DModel has the unknown option {min(unknown)}")
    options = DEFAULTS | options
    for name, default in DEFAULTS.items():
        is_none = options[name] is None and (default is None or name in MAY_BE_NONE)
        fits = is_none or _has_type(options[name], default, name in NUMBERS)
        _require(options, name, fits, f"values such as {default!r}")
    for name, values in SUPPORTED.items():
        _require(options, name, options[name] in values, " or ".join(map(repr, values)))
    channels = options["block_out_channels"]
    are_counts = bool(channels) and min(channels) >= channels[0] > 0
    _require(options, "block_out_channels", are_counts, "numbers, none below the first")
    _check_blocks(options)
    _require(options, "norm_num_groups", options["norm_num_groups"] is not None, "a number")
    for name, number in (
        ("attn_norm_num_groups", options["norm_num_groups"]),
        ("time_embedding_dim", 4 * channels[0]),
    ):
        _require(options, name, options[name] in (None, number), f"None or {number}")
    return options


def _has_type(value: Any, default: Any, may_be_fraction: bool) -> bool:
    """Whether an option's value is of the type of its default, which says nothing where it is None.

    A list stands for a tuple, since JSON has no other.
    """
    if default is None:
        return True
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(
            isinstance(v, type(default[0])) for v in value
        )
    if may_be_fraction:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def _check_blocks(options: Mapping[str, Any]) -> None:
    """Raises ValueError for types of blocks that our network does not have."""
    count = len(options["block_out_channels"])
    resampling = {name: options[name] for name in RESAMPLING}
    same = len(set(resampling.values())) == 1
    _require(options, "upsample_type", same, "that of downsample_type")
    is_residual = "resnet" in resampling.values()
    for name, known in BLOCKS.items():
        allowed = known[is_residual], known[-1]
        fit = len(options[name]) == count and set(options[name]) <= set(allowed)
        remedy = f"{count} of {' and '.join(allowed)}, for downsample_type = "
        _require(options, name, fit, f"{remedy}{options['downsample_type']!r}")


def _require(options: Mapping[str, Any], name: str, is_met: bool, remedy: Any) -> None:
    if not is_met:
        raise ValueError(f"the UNet2DModel has {name} = {options[name]!r}; supported: {remedy}")


def unet_settings(config: Mapping[str, Any], height: int) -> dict[str, Any]:
    """The attributes of the `UNet` that computes what a `UNet2DModel` does.

    Its `timestep_of` must be `foreign.timestep(…)` of the levels that the weights were trained on.

    Args:
      config: as for `full_options`.
      height: that of the images.

    Raises:
      ValueError: as `full_options`.
    """
    options = full_options(config)
    channels = options["block_out_channels"]
    is_added = options["resnet_time_scale_shift"] == "default"
    has_norm = is_added or options["attn_norm_num_groups"] is not None
    middle = "normalized" if has_norm else "unnormalized"
    return {
        "channels": channels[0],
        "channel_multipliers": tuple(_quotient(count, channels[0]) for count in channels),
        "num_res_blocks": options["layers_per_block"],
        **_attention_resolutions(options, height),
        "dropout": float(options["dropout"]),
        "num_groups": options["norm_num_groups"],
        "fourier_exponents": (),
        "center_input": options["center_input_sample"],
        "head_channels": options["attention_head_dim"] or 0,
        "middle_attention": middle if options["add_attention"] else "none",
        "middle_divisor": float(options["mid_block_scale_factor"]),
        "norm_epsilon": float(options["norm_eps"]),
        "scale_shift": not is_added,
        "residual_resampling": options["downsample_type"] == "resnet",
        "symmetric_downsampling": options["downsample_padding"] == 1,
        "frequency_shift": float(options["freq_shift"]),
        "cosines_first": options["flip_sin_to_cos"],
    }


def _quotient(count: int, first: int) -> float | int:
    return count / first if count % first else count // first


def _attention_resolutions(options: Mapping[str, Any], height: int) -> dict[str, tuple[int, ...]]:
    """The heights of the feature maps with attention: on both ways, or on one of them only."""
    down, up = (["Attn" in block for block in options[name]] for name in BLOCKS)
    ways = {
        "attention_resolutions": (True, True),
        "down_attention_resolutions": (True, False),
        "up_attention_resolutions": (False, True),
    }
    levels = list(enumerate(zip(down, up[::-1], strict=True)))
    return {
        name: tuple(height // 2**level for level, both in levels if both == way)
        for name, way in ways.items()
    }


def unet2d_options(network: UNet, image_shape: Sequence[int]) -> dict[str, Any]:
    """The options of the `UNet2DModel` that computes what our network does.

    Args:
      network: the network.
      image_shape: (height, width, channels) of the images.

    Raises:
      ValueError: with one line that names an attribute which a `UNet2DModel` cannot express.
    """
    if network.fourier_exponents:
        raise ValueError(
            f"model.unet.fourier_exponents = {network.fourier_exponents}; a UNet2DModel has no "
            "Fourier features of its input: only () can be exported"
        )
    if network.channel_multipliers[0] != 1:
        raise ValueError(
            f"model.unet.channel_multipliers = {network.channel_multipliers}; the first of a "
            "UNet2DModel is 1"
        )
    if network.middle_attention == "unnormalized" and not network.scale_shift:
        raise ValueError(
            "model.unet.middle_attention = 'unnormalized'; a UNet2DModel has it with "
            "model.unet.scale_shift = True only"
        )
    height, width, channels = image_shape
    heights = [height // 2**level for level in range(len(network.channel_multipliers))]
    plain = [known[network.residual_resampling] for known in BLOCKS.values()]
    resampling = "resnet" if network.residual_resampling else "conv"
    is_normalized = network.middle_attention == "normalized"
    return DEFAULTS | {
        "add_attention": network.middle_attention != "none",
        "attention_head_dim": network.head_channels or None,
        "attn_norm_num_groups": network.num_groups if is_normalized else None,
        "block_out_channels": network.features,
        "center_input_sample": network.center_input,
        "down_block_types": tuple(
            "AttnDownBlock2D" if network.has_attention(height, "down") else plain[0]
            for height in heights
        ),
        "downsample_padding": int(network.symmetric_downsampling),
        "dropout": network.dropout,
        "flip_sin_to_cos": network.cosines_first,
        "freq_shift": int(network.frequency_shift),
        "in_channels": channels,
        "layers_per_block": network.num_res_blocks,
        "mid_block_scale_factor": network.middle_divisor,
        "norm_eps": network.norm_epsilon,
        "norm_num_groups": network.num_groups,
        "num_class_embeds": network.num_classes + 1 if network.num_classes else None,
        "out_channels": network.out_channels or channels,
        "resnet_time_scale_shift": "scale_shift" if network.scale_shift else "default",
        "sample_size": height if height == width else (height, width),
        "up_block_types": tuple(
            "AttnUpBlock2D" if network.has_attention(height, "up") else plain[1]
            for height in reversed(heights)
        ),
        **dict.fromkeys(RESAMPLING, resampling),
    }


def module_names(num_levels: int, num_res_blocks: int) -> dict[str, str]:
    """Our name and diffusers' name of every layer that such a U-Net can have.

    Some networks lack some of these layers: shortcuts, and attention. Their up blocks are numbered
    from the smallest resolution, ours by the resolution's level.
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
        blocks[f"down_{level}_downsample"] = f"{down}.downsamplers.0"
        blocks[f"up_{level}_upsample"] = f"{up}.upsamplers.0"
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


def _weight_names(network: UNet, paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Our path and diffusers' name of each parameter."""
    modules = module_names(len(network.channel_multipliers), network.num_res_blocks)
    for path in paths:
        module, _, leaf = path.rpartition("/")
        yield path, LABELS.get(leaf) or f"{modules[module]}.{LEAVES[leaf]}"


def params_from_unet2d(
    state_dict: Mapping[str, Any], network: UNet, image_shape: Sequence[int]
) -> dict[str, Any]:
    """The weights of a `UNet2DModel` as parameters of a network of the same architecture.

    `unet_settings` makes that network. A table of labels without a row for 'no label' gets a row of
    zeros: such a network never predicts without a label.

    Args:
      state_dict: arrays by name; each is read once.
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
    shapes = flatten_dict(shapes, sep="/")
    names, stored = dict(_weight_names(network, list(shapes))), {_name(n): n for n in state_dict}
    differences = set(names.values()) ^ set(stored)
    if differences:
        raise ValueError(f"weights missing or left over: {', '.join(sorted(differences)[:6])}")
    params = {}
    for path, shape in shapes.items():
        name = names[path]
        weight = np.asarray(state_dict[stored[name]]).astype(np.float32, copy=False)
        if path in LABELS:
            missing_rows = shape.shape[0] - len(weight)
            params[path] = np.pad(weight, ((0, missing_rows == 1), (0, 0)))
        else:
            # Of another number of axes it has a wrong shape too.
            params[path] = weight.transpose(AXES.get(weight.ndim, range(weight.ndim)))
        if params[path].shape != shape.shape:
            raise ValueError(
                f"{name} has shape {params[path].shape} in our order of axes; the network "
                f"needs {shape.shape}"
            )
        params[path] = jnp.asarray(params[path])
    return unflatten_dict(params, sep="/")


def _name(stored: str) -> str:
    """The present name of a weight that may have the name of an older version."""
    for new, old in OLD_ATTENTION.items():
        if ".attentions." in stored:
            stored = stored.replace(f".{old}.", f".{new}.")
    return stored


def unet2d_from_params(params: Mapping[str, Any], network: UNet) -> dict[str, np.ndarray]:
    """The parameters of a network as weights of a `UNet2DModel`, by diffusers' names."""
    flat = flatten_dict(params, sep="/")
    weights = {}
    for path, name in _weight_names(network, list(flat)):
        weight = np.asarray(flat[path], np.float32)
        if path not in LABELS:
            weight = weight.transpose(np.argsort(AXES[weight.ndim]))
        weights[name] = np.ascontiguousarray(weight)
    return weights
