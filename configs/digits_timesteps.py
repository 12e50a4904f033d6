"""A study on the digits: the noise schedule × how t is drawn, by the variance of the loss.

    python main.py --experiment=ablate --config=configs/digits_timesteps.py --workdir=runs/timesteps

Eight trainings of 300 steps on the bound, of a network at one resolution and without attention: a
ninth is skipped, since a learned schedule has no discrete t to draw by importance. Nine minutes of
processor time, and 2.7 bits/dim at T = 50 for the baseline. docs/ablations.md has its table.
"""

from ml_collections import ConfigDict

from configs import digits
from configs.digits_ablation import shortened


def get_config() -> ConfigDict:
    """Three schedules, each with independent, stratified and importance-sampled times."""
    config = shortened(digits.get_config(), num_steps=300)
    config.model.unet.update(
        channel_multipliers=(1,), attention_resolutions=(), middle_attention="none"
    )
    config.schedule.learned.update(max=8.0, min=-5.0)
    config.train.accumulate = 1  # a learned schedule needs the whole batch
    config.ablate.axes = (
        (
            "schedule",
            {
                "straight": {},
                "cosine": {"schedule.name": "cosine"},
                "learned": {"schedule.name": "learned", "train.time": "continuous"},
            },
        ),
        ("train.timesteps", ("uniform", "stratified", "importance")),
    )
    config.ablate.update(num_timesteps=50, measures=("loss_variance",))
    return config
