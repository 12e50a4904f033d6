"""The settings of a study: --experiment=ablate."""

from configs.settings.declaration import Axes, Choice, Group, Int, Setting, Text, Tuple
from configs.settings.results import CHECKPOINT, SPLIT

MEASURES = ("loss_variance", "speed", "quality")


def ablate() -> Group:
    return Group(
        "--experiment=ablate: the bound for every combination of some settings.",
        axes=Setting(
            (),
            Axes(),
            "The axes of the study. The values of a setting, or named values that set several "
            "settings together.",
        ),
        baseline=Setting(
            (),
            Tuple(Text()),
            "The names of the values, one for each axis, that all combinations are compared with; "
            "(): the first of each.",
        ),
        seeds=Setting(
            (0,),
            Tuple(Int("[0, 2^32)"), min_length=1, distinct=True),
            "Seeds of the trainings: each combination is trained once with each.",
        ),
        split=Setting("test", SPLIT, "The split on which the bound is measured."),
        checkpoint=Setting("best", CHECKPOINT, "The best checkpoint on validation, or the latest."),
        num_timesteps=Setting(
            0, Int("[0, 10^7]"), "T of the measured bound; 0: schedule.num_timesteps."
        ),
        draws=Setting(
            2,
            Int("[2, 10^6]"),
            "Independent noises of each example and t, the same for every combination.",
        ),
        measures=Setting(
            (),
            Tuple(Choice(*MEASURES)),
            "Further measures: how much the training loss and its gradient vary with t and noise "
            "(loss_variance), training images per second (speed), and sample quality (quality).",
        ),
        repeats=Setting(
            32,
            Int("[2, 10^6]"),
            "Draws of t and noise for each of four batches, for the variance of the training loss.",
        ),
        cell=Setting(
            0,
            Int("[0, 10^6]"),
            "0: work on every training that no other process works on. K: only on the K-th, and on "
            "what is measured of it; for file systems without locks.",
        ),
    )
