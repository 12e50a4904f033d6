"""diffusers' `UNet2DModel`, for comparisons with our network here and in tests/parity."""

from typing import Any

from models.diffusers_weights import unet2d_options
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
    height, width, channels = image_shape
    channels *= 1 + 2 * len(network.fourier_exponents)
    plain = network.clone(
        fourier_exponents=(), out_channels=network.out_channels or image_shape[-1]
    )
    return diffusers.UNet2DModel(**unet2d_options(plain, (height, width, channels)))
