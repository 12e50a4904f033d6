"""diffusers' `UNet2DModel`, for comparisons with our network here and in tests/parity."""

from typing import Any


def ddpm_cifar10(channels: int = 128, num_groups: int = 32) -> Any:
    """google/ddpm-cifar10-32's architecture, at any width, with diffusers' own random weights.

    Sets torch's seed.

    Raises:
      ImportError: without torch or diffusers.
    """
    import diffusers
    import torch

    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(channels, 2 * channels, 2 * channels, 2 * channels),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=num_groups,
        act_fn="silu",
        add_attention=True,
        center_input_sample=False,
        dropout=0.0,
    ).eval()
