"""ImageNet, 64×64, with VDM's published hyper-parameters (Kingma et al. 2021; google-research/vdm).

    python main.py --config=configs/imagenet64.py --workdir=runs/imagenet64

For many GPUs or TPUs: about 7·10²¹ floating-point operations for 10 million steps of batch 128.
Published: 3.40 bits/dim on the validation set; iDDPM has 3.53.

The set is that of van den Oord et al. 2016, as in `configs/imagenet32.py`, which says which other
there is and how it is split; what differs from VDM is said in `configs/cifar10_vdm.py`. 1.27
million images, 16 GB decoded, are streamed.
"""

from ml_collections import ConfigDict

from configs import imagenet32


def get_config() -> ConfigDict:
    """VDM's network for 64×64: 64 residual blocks down and 65 up, 256 channels wide."""
    config = imagenet32.get_config()
    config.data.name = "downsampled_imagenet/64x64"
    config.model.unet.num_res_blocks = 64
    return config
