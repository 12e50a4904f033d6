"""The digits with a learned Σ_θ: one log-variance beside each pixel's prediction.

    python main.py --config=configs/digits_variance.py --workdir=runs/digits_variance

Trained on the bound at T = 50, where Σ_θ matters; it holds at any T, since it is told by errors.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    """The digits with a free diagonal Σ_θ."""
    config = digits.get_config()
    config.schedule.num_timesteps = 50
    config.model.variance = "learned_diagonal"
    return config
