"""A study on CIFAR-10, for GPUs: what DDPM's network predicts × what it is trained on.

    python main.py --experiment=ablate --config=configs/cifar10_ablation.py --workdir=runs/cifar10

For a GPU or several: start the command once on each, and they share the eight trainings of 100,000
steps. Not run so far. A step has 4.8·10¹² floating-point operations; at a fifth of an H100's peak
for TensorFloat-32, which is the share that DDPM's 10.6 hours on a TPU v3-8 amount to, a training
takes 80 minutes, its bound 4, and the study 11 hours on one GPU.
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    """Two parameterisations on the bound and on L_simple, each with two training seeds."""
    config = cifar10.get_config()
    config.train.update(num_steps=100_000, checkpoint_every=20_000, sample_every=100_000)
    config.ablate.axes = (
        ("model.parameterization", ("eps", "v")),
        ("train.objective", ("simple", "vlb")),
    )
    config.ablate.update(seeds=(0, 1), num_timesteps=100)
    return config
