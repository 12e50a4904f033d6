"""Options of a `UNet2DModel`, without PyTorch; tests/parity/test_unet.py has its weights."""

import pytest

from models.diffusers_weights import unet2d_options, unet_settings
from models.unet import UNet

NETWORKS = [
    UNet(),
    UNet(channels=12, channel_multipliers=(1, 3), num_groups=3, head_channels=4),
    UNet(scale_shift=True, middle_attention="unnormalized", residual_resampling=True),
    UNet(middle_attention="none", center_input=True, cosines_first=True, frequency_shift=0.0),
    UNet(
        channels=48,
        channel_multipliers=(1, 4 / 3, 2),
        num_groups=16,
        attention_resolutions=(16,),
        down_attention_resolutions=(8,),
        up_attention_resolutions=(32,),
        middle_divisor=2**0.5,
    ),
    UNet(attention_resolutions=(), norm_epsilon=0.1, symmetric_downsampling=True, dropout=0.0),
]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_options_of_a_network_make_the_same_network(network):
    options = unet2d_options(network, (32, 16, 3))
    assert UNet(**unet_settings(options, 32)) == network
    assert (options["sample_size"], options["in_channels"]) == ((32, 16), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn = 'gelu'; supported: 'silu' or 'swish'"),
        ({"freq_shift": 2}, "freq_shift = 2; supported: 0 or 1"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier'"),
        ({"time_embedding_dim": 100}, "time_embedding_dim = 100; supported: None or 512"),
        ({"attn_norm_num_groups": 8}, "attn_norm_num_groups = 8; supported: None or 32"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'; supported: None"),
        ({"block_out_channels": (0, 1)}, "supported: numbers, none below the first"),
        ({"block_out_channels": (128, 64)}, "supported: numbers, none below the first"),
        ({"block_out_channels": (128,)}, "down_block_types = .*supported: 1 of DownBlock2D"),
        ({"downsample_type": "resnet"}, "upsample_type = 'conv'; supported: that of downsample"),
        (
            {"downsample_type": "resnet", "upsample_type": "resnet"},
            "supported: 4 of ResnetDownsampleBlock2D and AttnDownBlock2D, for .* = 'resnet'",
        ),
        ({"new": 1}, "unknown option new"),
        ({"block_out_channels": ["a", "b"]}, "supported: values such as .224, 448"),
        (
            {"down_block_types": "DownBlock2D"},
            "down_block_types = 'DownBlock2D'; supported: values",
        ),
        ({"layers_per_block": [1, 2]}, "layers_per_block = .1, 2.; supported: values such as 2"),
        ({"mid_block_scale_factor": None}, "mid_block_scale_factor = None; supported: values such"),
        ({"add_attention": "yes"}, "add_attention = 'yes'; supported: values such as True"),
        ({"dropout": "x"}, "dropout = 'x'; supported: values such as 0.0"),
    ],
)
def test_an_option_that_our_network_cannot_express_is_named(changes, message):
    options = unet2d_options(UNet(), (32, 32, 3)) | changes
    with pytest.raises(ValueError, match=message) as raised:
        unet_settings(options, 32)
    assert "\n" not in str(raised.value)
