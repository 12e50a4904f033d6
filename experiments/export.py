"""Writes a trained network as a pipeline of diffusers.

    python main.py --experiment=export --workdir=runs/digits --config.diffusers.target=digits-ddpm

`DDPMPipeline.from_pretrained` and `DDIMPipeline.from_pretrained` load the folder. A sidecar in it
has what they cannot say, and --experiment=import reads it. docs/checkpoints.md has more.
"""

from typing import Any

from etils import epath
from ml_collections import ConfigDict

from experiments.harness import checks
from experiments.harness.errors import ConfigError
from experiments.harness.pipelines import folder, scheduler
from experiments.harness.pipelines.folder import Pipeline
from experiments.harness.setup import trained
from experiments.harness.setup.definition import define_model
from models.diffusers_weights import LABELS, unet2d_from_params, unet2d_options


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Exports, and prints the folder."""
    export(config, workdir)
    print(f"{config.diffusers.target} holds the network of {workdir} as a DDPMPipeline")


def export(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes the EMA weights to the new folder `diffusers.target`.

    Raises:
      ConfigError: with one line, before anything is written, for a setting that a pipeline cannot
        express, a folder that exists, or a checkpoint that does not fit.
    """
    checks.check(config)
    folder.check_target(config.diffusers.target)
    unet, process = _options(config)
    checkpoint = config.diffusers.checkpoint
    run = trained.load(config, workdir, checkpoint, writes=False, uses_data=False)
    weights = unet2d_from_params(run.params["network"], run.definition.network)
    if unet["num_class_embeds"] == run.definition.num_classes:
        # Without the row of no label, which this network never learned.
        weights |= {name: weights[name][:-1] for name in LABELS.values() if name in weights}
    sidecar = {"config": config.to_dict(), "step": run.step}
    folder.save(config.diffusers.target, Pipeline(unet, process, sidecar, weights))


def _options(config: ConfigDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of network and scheduler."""
    if config.model.name != "unet":
        raise ConfigError(f"config.model.name = {config.model.name!r}; only unet can be exported")
    if config.schedule.name == "learned":
        raise ConfigError("config.schedule.name = 'learned'; diffusers has no learned schedule")
    definition = define_model(config)
    process = scheduler.to_options(config, definition.schedule)
    if config.model.unet.noise_input != "ddpm_timestep":
        raise ConfigError(
            f"config.model.unet.noise_input = {config.model.unet.noise_input!r}; diffusers gives "
            "a network the index of the level: only ddpm_timestep can be exported"
        )
    try:
        unet = unet2d_options(definition.network, definition.image_shape)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from error
    if config.model.class_conditional and config.train.label_dropout == 0:
        unet["num_class_embeds"] -= 1
    return unet, process
