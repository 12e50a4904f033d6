"""A study on the digits: what the network predicts × what it is trained on.

    python main.py --experiment=ablate --config=configs/digits_ablation.py --workdir=runs/ablation

Nine trainings of 300 steps, and the bound of each at T = 50: 2.7 bits/dim for the baseline. Nine
minutes on two CPU cores. docs/ablations.md has its table.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    """Three parameterisations, each trained on the bound, on L_simple and with clipped weights."""
    config = shortened(digits.get_config(), num_steps=300)
    config.ablate.axes = (
        ("model.parameterization", ("v", "eps", "x_0")),
        ("train.objective", ("vlb", "simple", "min_snr")),
    )
    config.ablate.num_timesteps = 50
    return config


def shortened(config: ConfigDict, num_steps: int) -> ConfigDict:
    """A short training with a bound on validation at five steps, and a few samples at the end."""
    config.train.update(
        num_steps=num_steps,
        learning_rate=3e-3,
        checkpoint_every=num_steps // 5,
        sample_every=num_steps,
        sample_timesteps=20,
    )
    config.sample.num_samples = 16
    return config
