"""From a config to the objects it names, and clear errors where it names none."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, Int, Key, Shaped
from ml_collections import ConfigDict

from configs.settings.declaration import shown, value_of
from diffusion.decoders import DECODERS, Decoder, Quantization, gaussian
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from diffusion.schedules import SCHEDULES, Array, Levels, Schedule, linear_log_snr
from diffusion.variances import VARIANCES, Variance
from experiments.harness.checks import pick
from experiments.harness.data.splits import describe_data, unlabelled_message
from experiments.harness.errors import ConfigError
from models.foreign import timestep
from models.noise_schedule import NoiseSchedule, tabulate
from models.unet import UNet, log_snr_to_timestep


class ModelDefinition(NamedTuple):
    """A model without its parameters, as a config defines it: schedule, networks, Σ_θ, decoder.

    Attributes:
      schedule: the noise schedule; where it is learned, the one that it starts from.
      levels: its T levels.
      noise_schedule: the network that a learned schedule is, else None.
      network: a Flax module (x_t, log_snr, condition, train) -> prediction.
      parameterization: what the network predicts.
      variance: Σ_θ.
      quantization: grey levels as data; None for continuous data.
      decoder: p(x_0 | x_1).
      image_shape: (height, width, channels); of data that are no images, any shape.
      num_classes: whose labels the network can be given; 0 where it is unconditional.
    """

    schedule: Schedule
    levels: Levels
    noise_schedule: NoiseSchedule | None
    network: nn.Module
    parameterization: str
    variance: Variance
    quantization: Quantization | None
    decoder: Decoder
    image_shape: tuple[int, ...]
    num_classes: int = 0

    @property
    def are_images(self) -> bool:
        """Whether examples can be drawn as pictures, and not as points."""
        return len(self.image_shape) == 3

    def to_data(self, images: Shaped[Array, "b *d"]) -> Float[Array, "b *d"]:
        """x_0 of stored examples: of grey levels their values, of continuous data the same."""
        if self.quantization is None:
            return jnp.asarray(images, float)
        return self.quantization.to_data(images)

    def model(
        self,
        params: Any,
        labels: Int[Array, "b"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> DiffusionModel:
        """p with these parameters ("network"), given labels.

        Args:
          params: the networks' parameters.
          labels: classes of the examples, the condition; `num_classes` stands for no label.
          dropout_key: the key of dropout; None for no dropout.
        """

        def denoiser(x_t, log_snr, condition=None):
            rngs = None if dropout_key is None else {"dropout": dropout_key}
            train = dropout_key is not None
            return self.network.apply(
                {"params": params["network"]}, x_t, log_snr, condition, train=train, rngs=rngs
            )

        reverse = Reverse(denoiser, self.parameterization, self.variance, labels)
        return DiffusionModel(reverse, self.decoder, self.levels)

    def learned(self, params: Any) -> "ModelDefinition":
        """This definition with the schedule that these parameters ("noise_schedule") make."""
        if self.noise_schedule is None:
            return self

        schedule = tabulate(_log_snr_of(self.noise_schedule), params["noise_schedule"])
        return self._replace(schedule=schedule, levels=schedule.levels(self.levels.num_timesteps))


@functools.cache
def _log_snr_of(noise_schedule: NoiseSchedule) -> Callable:
    """(params, time) -> log-SNR, one function for each network, so that it is compiled once."""
    return lambda params, time: noise_schedule.apply({"params": params}, time)


def _unet(config: ConfigDict, schedule: Schedule, out_channels: int, num_classes: int) -> nn.Module:
    settings, timestep_of = config.to_dict(), log_snr_to_timestep
    if settings.pop("noise_input") == "ddpm_timestep":
        if len(schedule.knots) < 3:
            raise ConfigError(
                "config.model.unet.noise_input = 'ddpm_timestep' needs a schedule with a table of "
                "β, such as linear_beta; use log_snr"
            )
        timestep_of = timestep(schedule.knots)
    return UNet(
        **settings, out_channels=out_channels, num_classes=num_classes, timestep_of=timestep_of
    )


MODELS = {"unet": _unet}


def define_model(config: ConfigDict) -> ModelDefinition:
    """The model that a config defines; nothing is compiled.

    The shape of the images and their number of grey levels are the training split's. The decoder of
    continuous data is a Gaussian, whatever `decoder` says.

    Raises:
      ConfigError: for a setting that is unknown or does not fit the others.
    """
    make_model = pick(MODELS, config.model.name, "config.model.name")
    variance = pick(VARIANCES, config.model.variance, "config.model.variance")()
    source = describe_data(config, "train")
    if config.model.class_conditional and not source.num_classes:
        raise ConfigError(unlabelled_message(config, "train", source.unlabelled))
    num_classes = source.num_classes if config.model.class_conditional else 0
    quantization, decoder = _decoder(config, source.num_levels)
    schedule, levels, noise_schedule = _schedule(config)
    out_channels = source.image_shape[-1] * (2 if variance.is_learned else 1)
    options = config.model.get(config.model.name, ConfigDict())
    network = make_model(options, schedule, out_channels, num_classes)
    try:
        network.validate(source.image_shape)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from error
    return ModelDefinition(
        schedule=schedule,
        levels=levels,
        noise_schedule=noise_schedule,
        network=network,
        parameterization=config.model.parameterization,
        variance=variance,
        quantization=quantization,
        decoder=decoder,
        image_shape=source.image_shape,
        num_classes=num_classes,
    )


def _decoder(config: ConfigDict, num_levels: int) -> tuple[Quantization | None, Decoder]:
    """The grey levels and the decoder of data with this number of levels; 0 for continuous data."""
    name = config.decoder.name
    make_decoder = pick(DECODERS, name, "config.decoder.name")
    if not num_levels:
        return None, gaussian()
    quantization = Quantization(num_levels, config.decoder.scaling)
    return quantization, make_decoder(quantization, **config.decoder.get(name, {}))


def require_grey_levels(definition: ModelDefinition, setting: str, value: Any, remedy: str) -> None:
    """Raises ConfigError if a setting makes no sense for continuous data."""
    if definition.quantization is None:
        raise ConfigError(
            f"config.{setting} = {shown(value)} needs grey levels, and the data are continuous; "
            f"{remedy}"
        )


def _schedule(config: ConfigDict) -> tuple[Schedule, Levels, NoiseSchedule | None]:
    """The schedule, its T levels, and its network where it is learned."""
    name, noise_schedule = config.schedule.name, None
    options = config.schedule.get(name, ConfigDict())
    if name == "learned":
        noise_schedule = NoiseSchedule(**options)
    else:
        make_schedule = pick(SCHEDULES, name, "config.schedule.name")
    try:
        if noise_schedule is not None:
            noise_schedule.validate()
            schedule = linear_log_snr(options.max, options.min)
        else:
            with np.errstate(all="ignore"):  # an overflow makes a β that is refused
                schedule = make_schedule(**options)
        return schedule, schedule.levels(config.schedule.num_timesteps), noise_schedule
    except ValueError as error:
        values = ", ".join(f"{key} = {shown(value)}" for key, value in options.items())
        message = str(error).removeprefix("schedule.learned.")
        raise ConfigError(f"config.schedule.{name} with {values}: {message}") from error


def check_levels(config: ConfigDict, definition: ModelDefinition, setting: str) -> None:
    """Raises ConfigError unless the schedule has the numbers of levels that a setting lists."""
    value = value_of(config, setting)
    for num_timesteps in value if isinstance(value, tuple) else (value,):
        try:
            definition.schedule.levels(num_timesteps)
        except ValueError as error:
            raise ConfigError(
                f"config.{setting} = {value}; config.schedule.{config.schedule.name} has no "
                f"{num_timesteps} levels: {error}"
            ) from error
