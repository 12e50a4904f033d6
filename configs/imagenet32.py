"""ImageNet, 32×32, with VDM's published hyper-parameters (Kingma et al. 2021; google-research/vdm).

    python main.py --config=configs/imagenet32.py --workdir=runs/imagenet32

For many GPUs or TPUs: twice the width of its CIFAR-10 network, so about 8·10²⁰ floating-point
operations for 10 million steps of batch 128. Published: 3.72 bits/dim on the validation set.

Two sets go by this name. This is that of van den Oord et al. 2016 (downsampled_imagenet/32x32 of
tensorflow-datasets), which the published number is of. imagenet_resized/32x32 (Chrabaszcz et al.
2017) is resized otherwise, and its bits/dim do not compare: i-DODE (Zheng et al. 2023) has 3.69 on
the first and 3.43 on the second.

    --config.data.name=imagenet_resized/32x32

1.27 million images, 3.9 GB decoded, are streamed. What differs from VDM is said in
`configs/cifar10_vdm.py`; the last 10,000 training images choose the checkpoint, and the set's own
validation split is the test.
"""

from ml_collections import ConfigDict

from configs import base
from configs.cifar10_vdm import with_vdm


def get_config() -> ConfigDict:
    """VDM's network, 256 channels wide."""
    config = base.get_config()
    config.data.update(
        name="downsampled_imagenet/32x32",
        splits={"train": "train[:-10000]", "validation": "train[-10000:]", "test": "validation"},
    )
    return with_vdm(config, channels=256, num_res_blocks=32)
