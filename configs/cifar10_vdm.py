"""CIFAR-10 with VDM's published hyper-parameters (Kingma et al. 2021; google-research/vdm).

    python main.py --config=configs/cifar10_vdm.py --workdir=runs/cifar10_vdm

For several GPUs or TPUs: 27 G multiply-adds an image forward, so about 2·10²⁰ floating-point
operations for 10 million steps of batch 128. Published, without augmentation: 2.65 bits/dim on the
test set as T → ∞ (the released checkpoint 2.637), and by T 4.31 at 10, 2.84 at 100, 2.67 at 1000.

The network stays at 32×32 throughout: 32 residual blocks down, 33 up, and attention in the middle
alone, with Fourier features of the input; 30.6 M parameters. The log-SNR is learned between ends
that are trained by the bound. What differs: theirs is a straight line between its ends, and here a
monotone network that starts from one; the prediction is not added to the network's input; the
embedding spans part of the range of theirs, which is scaled to the ends; the noise level reaches a
block by a layer with a bias that starts at random; the schedule learns at a rate of its own, 0.01,
and the network's biases decay too, where theirs do not and the schedule does; gradients are clipped
at norm 1; and the last 1,000 training images choose the checkpoint.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """VDM's network, trained in continuous time on a learned schedule."""
    config = base.get_config()
    config.data.update(
        name="cifar10",
        splits={"train": "train[:49000]", "validation": "train[49000:]", "test": "test"},
    )
    return with_vdm(config, channels=128, num_res_blocks=32)


def with_vdm(config: ConfigDict, channels: int, num_res_blocks: int) -> ConfigDict:
    """What VDM's runs without augmentation have in common; its ImageNet runs use it too."""
    config.schedule.name = "learned"
    config.schedule.learned.update(max=13.3, min=-5.0, train_ends=True)
    config.model.parameterization = "eps"
    config.model.unet.update(
        channels=channels,
        channel_multipliers=(1,),
        num_res_blocks=num_res_blocks,
        attention_resolutions=(),
        dropout=0.1,
        # Periods of 2 grey levels and 1. The released code's 6 and 7 are of 2ⁿ · 2π.
        fourier_exponents=(7, 8),
    )
    config.decoder.update(name="categorical", scaling="midpoints")
    config.train.update(
        objective="vlb",
        time="continuous",
        timesteps="stratified",
        batch_size=128,
        num_steps=10_000_000,
        optimizer="adamw",
        learning_rate=2e-4,
        beta2=0.99,
        weight_decay=0.01,
        warmup_steps=100,
        ema_decay=0.9999,
        log_every=1_000,
        checkpoint_every=10_000,
        sample_every=100_000,
    )
    config.evaluate.update(batch_size=64, chunk_size=4, target=0.001, also=("continuous",))
    return config
