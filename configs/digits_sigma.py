"""A study on the digits: Σ_θ × T, all measured with one network.

    python main.py --experiment=ablate --config=configs/digits_sigma.py --workdir=runs/sigma

One training of 300 steps with a learned Σ_θ, and twenty bounds: six minutes of processor time, and
2.7 bits/dim with β̃ at T = 50. docs/ablations.md has its table.
"""

from ml_collections import ConfigDict

from configs import digits_variance
from configs.digits_ablation import shortened


def get_config() -> ConfigDict:
    """Every Σ_θ that the network can have, at four numbers of levels."""
    config = shortened(digits_variance.get_config(), num_steps=300)
    names = ("beta_tilde", "beta", "learned_diagonal", "analytic_isotropic", "analytic_diagonal")
    config.ablate.axes = (
        ("evaluate.variance", names),
        ("ablate.num_timesteps", (50, 10, 25, 100)),
    )
    return config
