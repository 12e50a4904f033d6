"""Reads a network that diffusers saved into a work directory, for every other experiment.

    python main.py --experiment=import --config=configs/cifar10.py --workdir=runs/ddpm \
        --config.diffusers.source=ddpm-cifar10-32

The files state network, schedule, parameterisation and Σ_θ. The config states the data, their
scaling and the decoder, unless our own export wrote the pipeline. docs/checkpoints.md has more.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from configs import recorded
from diffusion.forward import example_noise
from experiments.harness import checks, memory
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError, in_short
from experiments.harness.pipelines import folder, scheduler
from experiments.harness.pipelines.folder import SIDECAR, Pipeline
from experiments.harness.seeds import stream
from experiments.harness.setup.definition import ModelDefinition, define_model
from experiments.harness.workdir import lock, record
from experiments.harness.workdir.checkpoints import Checkpoints
from experiments.harness.workdir.files import write_json
from models.diffusers_weights import full_options, params_from_unet2d, unet_settings

STEP = 0
CHECKED_IMAGES = 4
LARGEST_ERROR = 1.0  # of ε̂ = 0, which is no prediction


class Report(NamedTuple):
    """An imported network.

    Attributes:
      source: the folder that it was read from.
      files: the SHA-256 digest of every file that was read.
      num_parameters: the number of its parameters.
      recognised: what the files state, as our settings.
      assumed: what they do not state, one sentence each.
      eps_error: mean (ε − ε̂)² of a coordinate, by log-SNR, on a few training images.
      warnings: what the self-check found.
    """

    source: str
    files: dict[str, str]
    num_parameters: int
    recognised: dict[str, Any]
    assumed: list[str]
    eps_error: dict[str, float]
    warnings: list[str]

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.num_parameters:,} parameters"]
        for name, value in self.recognised.items():
            is_long = isinstance(value, tuple) and len(value) > 8
            lines.append(f"  {name} = {f'a table of {len(value)}' if is_long else repr(value)}")
        lines += [f"assumed: {sentence}" for sentence in self.assumed]
        errors = ", ".join(f"{e:.3g} at log-SNR {name}" for name, e in self.eps_error.items())
        lines.append(f"self-check: mean (ε − ε̂)² {errors}")
        return "\n".join(lines + [f"warning: {sentence}" for sentence in self.warnings])


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Imports, and prints the report."""
    print(import_network(config, workdir))


def import_network(config: ConfigDict, workdir: epath.PathLike) -> Report:
    """Writes the network that `diffusers.source` names to a new work directory.

    The directory gets config.json, a checkpoint of the weights alone, and import.json, the report.

    Args:
      config: data, scaling and decoder; network and process are replaced by the files' own.
      workdir: a directory without a run.

    Raises:
      ConfigError: with one line, before anything is written, for files that cannot be read or
        expressed, or that do not fit the data.
    """
    if not config.diffusers.source:
        raise ConfigError("config.diffusers.source = ''; name the folder of a saved pipeline")
    record.check_new(workdir)
    record.check(config, workdir)
    pipeline = folder.load(config.diffusers.source)
    try:
        config, recognised, assumed = _configure(config, pipeline)
    except ConfigError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder.SOURCE} = {config.diffusers.source!r}: an option has a wrong type "
            f"({in_short(error)})"
        ) from error
    checks.check(config, "evaluate", "sample")
    definition = define_model(config)
    memory.check_memory(config, definition.image_shape, "evaluate")
    try:
        network = params_from_unet2d(pipeline.weights, definition.network, definition.image_shape)
    except ValueError as error:
        raise ConfigError(f"{folder.SOURCE} = {config.diffusers.source!r}: {error}") from error
    params, files = {"network": network}, pipeline.files
    del pipeline  # and with it the memory that its files are mapped to
    eps_error = _eps_errors(config, definition, params)
    report = Report(
        source=config.diffusers.source,
        files=files,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        recognised=recognised,
        assumed=assumed,
        eps_error=eps_error,
        warnings=_warnings(eps_error),
    )
    record.make(workdir)
    with lock.held(workdir):
        record.record(config, workdir)
        write_json(epath.Path(workdir) / record.IMPORT_FILE, report._asdict())
        with Checkpoints(workdir) as checkpoints:
            checkpoints.save(STEP, {"ema_params": params})
    return report


def _configure(
    config: ConfigDict, pipeline: Pipeline
) -> tuple[ConfigDict, dict[str, Any], list[str]]:
    """The config with what the files state; that alone; and what was assumed."""
    source, recognised, assumed = config.diffusers.source, {}, []
    if pipeline.sidecar is not None:
        config = _from_sidecar(config, pipeline.sidecar)
    else:
        shape = f"{config.data.name!r}, scaled as config.decoder.scaling = "
        assumed.append(f"the data are {shape}{config.decoder.scaling!r}")
        assumed.append(f"the decoder is config.decoder.name = {config.decoder.name!r}")
    if pipeline.sidecar is None and pipeline.scheduler is None:
        names = "schedule and parameterisation are config.schedule and config.model"
        assumed.append(f"{names}, since {source} has no {folder.SCHEDULER}")
    elif pipeline.sidecar is None:
        process = scheduler.to_settings(pipeline.scheduler)
        recognised, assumed = process.settings, assumed + process.assumed
    variance = recognised.get("model.variance", config.model.variance)
    network, remarks = _network(config, pipeline.unet, variance)
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(recognised | network)
    return config.lock(), recognised | network, assumed + remarks


def _from_sidecar(config: ConfigDict, sidecar: dict[str, Any]) -> ConfigDict:
    """The config that was exported, with the place of the data here and the names of files here."""
    try:
        exported = recorded.from_json(sidecar["config"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{SIDECAR} does not fit this version ({in_short(error)})") from error
    exported.diffusers = config.diffusers
    exported.data.data_dir = config.data.data_dir or exported.data.data_dir
    return exported


def _network(
    config: ConfigDict, unet: dict[str, Any], variance: str
) -> tuple[dict[str, Any], list[str]]:
    """The settings of a network that fits the data, and what was assumed."""
    source = splits.describe_data(config, "train")
    height, width, channels = source.image_shape
    place = f"config.json of {config.diffusers.source}"
    try:
        options = full_options(unet)
        settings = unet_settings(unet, height)
    except ValueError as error:
        remedy = "docs/checkpoints.md shows how to measure other networks in Python"
        raise ConfigError(f"{place}: {error}; {remedy}") from error
    size = options["sample_size"] or (height, width)
    size = (size, size) if isinstance(size, int) else tuple(size)
    if (*size, options["in_channels"]) != source.image_shape:
        raise ConfigError(
            f"{place} is of images of shape {(*size, options['in_channels'])}, but those of "
            f"config.data.name = {config.data.name!r} have {source.image_shape}; name the model's "
            "data set, as in --config=configs/cifar10.py"
        )
    out = channels * (2 if variance == "learned_range" else 1)
    if options["out_channels"] != out:
        raise ConfigError(
            f"{place} has out_channels = {options['out_channels']}; Σ_θ = {variance} needs {out} "
            "(variance_type of the scheduler says whether the network has a second output)"
        )
    settings = {f"model.unet.{name}": value for name, value in settings.items()}
    settings |= {"model.name": "unet", "model.unet.noise_input": "ddpm_timestep"}
    rows, classes = options["num_class_embeds"], source.num_classes
    settings["model.class_conditional"] = rows is not None
    if rows is None:
        return settings, []
    if rows not in (classes, classes + 1):
        raise ConfigError(
            f"{place} has num_class_embeds = {rows}; {config.data.name} has {classes} classes: it "
            f"must be {classes}, or {classes + 1} with one for no label"
        )
    if rows == classes:
        settings["train.label_dropout"] = 0.0
        return settings, ["the network never predicts without a label: it has none for it"]
    return settings, [f"class {classes} of the network stands for no label"]


def _eps_errors(config: ConfigDict, definition: ModelDefinition, params: Any) -> dict[str, float]:
    """The mean (ε − ε̂)² of a few training images at four levels, from a quarter of T on."""
    data = splits.load_measured(config, "train", splits.first(CHECKED_IMAGES))
    root, num_timesteps = stream(config.seed, "estimate"), definition.levels.num_timesteps

    @jax.jit
    def mean_error(params, examples, index, log_snr):
        x_0 = definition.to_data(examples.images)
        eps = example_noise(root, index, definition.image_shape)(jnp.zeros_like(index))
        reverse = definition.model(params, examples.labels).reverse
        return jnp.mean(reverse.squared_eps_error(x_0, eps, log_snr))

    errors = {}
    for t in dict.fromkeys(max(num_timesteps * k // 4, 1) for k in range(1, 5)):
        log_snr = np.full(1, definition.levels.log_snr[t], np.float32)
        # One image at a time, which takes the least memory.
        at = [
            mean_error(params, data.examples(index), index, log_snr)
            for index in np.arange(len(data.images))[:, None]
        ]
        errors[f"{log_snr[0]:.2f}"] = float(np.mean(at))
    return errors


def _warnings(eps_error: dict[str, float]) -> list[str]:
    values = list(eps_error.values())
    if not np.isfinite(values).all():
        return ["the network's output is not finite: its weights are damaged"]
    # The last level may have no signal at all, and then the error is zero for any x̂_0.
    if (largest := max(values[-2:])) >= LARGEST_ERROR:
        return [
            f"at low log-SNR (ε − ε̂)² is {largest:.3g}, no better than ε̂ = 0: the "
            "parameterisation, the schedule or the scaling of the data may be wrong"
        ]
    return []
