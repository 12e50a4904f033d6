"""diffusers' `UNet2DModel`, for comparisons with our network here and in tests/parity."""

from typing import Any

from models.unet import UNet


def ddpm_cifar10(channels: int = 128, num_groups: int = 32) -> Any:
    """google/ddpm-cifar10-32's architecture, at any width, with diffusers' own random weights.

    Sets torch's seed.

    Raises:
      ImportError: without torch or diffusers.
    """
    return like(UNet(channels, num_groups=num_groups, dropout=0.0), (32, 32, 3)).eval()


def like(network: UNet, image_shape: tuple[int, int, int]) -> Any:
    """A network of the same layers as ours, with diffusers' own random weights.

    Sets torch's seed. Fourier features are not among its layers: its input has their channels.

    Args:
      network: an unconditional network.
      image_shape: (height, width, channels) of the images.

    Raises:
      ImportError: without torch or diffusers.
    """
    import diffusers
    import torch

    torch.manual_seed(0)
    height, _, channels = image_shape
    levels = range(len(network.channel_multipliers))
    attention = [height // 2**level in network.attention_resolutions for level in levels]
    return diffusers.UNet2DModel(
        sample_size=height,
        in_channels=channels * (1 + 2 * len(network.fourier_exponents)),
        out_channels=network.out_channels or channels,
        block_out_channels=tuple(network.channels * m for m in network.channel_multipliers),
        layers_per_block=network.num_res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        up_block_types=tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in attention[::-1]),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=network.num_groups,
        act_fn="silu",
        add_attention=True,
        center_input_sample=False,
        dropout=network.dropout,
    )
