"""Every setting with its default, permitted values and meaning.

A config of a data set starts from `get_config()` and sets what differs. Override any setting on the
command line, as in `--config.train.batch_size=64`. `python main.py --helpconfig` and
docs/settings.md list all of them; configs/settings/ declares them.
"""

from ml_collections import ConfigDict

from configs.settings import results, studies, training
from configs.settings.declaration import Group, Int, Setting

SETTINGS = Group(
    seed=Setting(0, Int("[0, 2^32)"), "Seed of parameters, data order, noise and samples."),
    data=training.data(),
    schedule=training.schedule(),
    model=training.model(),
    decoder=training.decoder(),
    train=training.train(),
    devices=training.devices(),
    profile=training.profile(),
    evaluate=results.evaluate(),
    sample=results.sample(),
    quality=results.quality(),
    variance=results.variance(),
    analytic=results.analytic(),
    sigma=results.sigma(),
    spacing=results.spacing(),
    diffusers=results.diffusers(),
    compress=results.compress(),
    ablate=studies.ablate(),
    report=results.report(),
)
"""All settings. A test compares docs/settings.md with them."""


def get_config() -> ConfigDict:
    """The defaults of all settings, locked: an undeclared name is an error."""
    return ConfigDict(SETTINGS.defaults()).lock()
