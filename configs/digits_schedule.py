"""The digits with a learned noise schedule (q learned, lecture 13.11–13.13) between the same ends.

    python main.py --config=configs/digits_schedule.py --workdir=runs/digits_schedule

The network of `digits`, trained on the bound as T → ∞; beside it a monotone network between
log-SNRs 8 and −5 is trained for the least variance of the loss. Two minutes of training on two CPU
cores, and 1.89 bits/dim on the test split, at T = 1000 as in the limit.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    """The digits, in continuous time, with a schedule that is learned between pinned ends."""
    config = digits.slowly(digits.get_config())
    config.schedule.name = "learned"
    config.schedule.learned.update(max=8.0, min=-5.0)
    config.train.update(time="continuous", accumulate=1)
    return config
