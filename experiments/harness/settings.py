"""From a config to the objects it names, and clear errors where it names none."""

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from flax import linen as nn
from jaxtyping import Int, Key
from ml_collections import ConfigDict

from diffusion.decoders import DECODERS, FIRST_VARIANCES, SCALINGS, Decoder, Quantization
from diffusion.objectives import OBJECTIVES, Objective
from diffusion.reverse import PARAMETERIZATIONS, Reverse
from diffusion.sampling import X_0_TREATMENTS
from diffusion.schedules import SCHEDULES, Array, Levels, Schedule, linear_log_snr
from diffusion.timesteps import TIMES
from diffusion.variances import VARIANCES, Variance
from experiments.harness import data
from experiments.harness.errors import ConfigError
from models.noise_schedule import NoiseSchedule, tabulate
from models.unet import UNet, ddpm_timestep, log_snr_to_timestep

Labelled = TypeVar("Labelled", data.Dataset, data.Examples)


class Problem(NamedTuple):
    """What a config says of the mathematics: everything but data, parameters and training.

    Attributes:
      schedule: the noise schedule; where it is learned, the one that it starts from.
      levels: its T levels.
      noise_schedule: the network that a learned schedule is, else None.
      network: a Flax module (x_t, log_snr, condition, train) -> prediction.
      parameterization: what the network predicts.
      variance: Σ_θ.
      quantization: grey levels as data.
      decoder: p(x_0 | x_1).
      image_shape: (height, width, channels).
      num_classes: whose labels the network can be given; 0 where it is unconditional.
    """

    schedule: Schedule
    levels: Levels
    noise_schedule: NoiseSchedule | None
    network: nn.Module
    parameterization: str
    variance: Variance
    quantization: Quantization
    decoder: Decoder
    image_shape: tuple[int, int, int]
    num_classes: int = 0

    def reverse(
        self,
        params: Any,
        dropout_key: Key[Array, ""] | None = None,
        labels: Int[Array, "b"] | None = None,
    ) -> Reverse:
        """p_θ with these parameters ("network").

        Args:
          params: the networks' parameters.
          dropout_key: for dropout; None for none.
          labels: the condition of every call that is given none itself. One equal to `num_classes`
            is no label.
        """

        def denoiser(x_t, log_snr, condition=None):
            condition = labels if condition is None else condition
            rngs = None if dropout_key is None else {"dropout": dropout_key}
            train = dropout_key is not None
            return self.network.apply(
                {"params": params["network"]}, x_t, log_snr, condition, train=train, rngs=rngs
            )

        return Reverse(denoiser, self.parameterization, self.variance)

    def learned(self, params: Any) -> "Problem":
        """This problem with the schedule that these parameters ("noise_schedule") make."""
        if self.noise_schedule is None:
            return self

        schedule = tabulate(_log_snr_of(self.noise_schedule), params["noise_schedule"])
        return self._replace(schedule=schedule, levels=schedule.levels(self.levels.num_timesteps))


@functools.cache
def _log_snr_of(noise_schedule: NoiseSchedule) -> Callable:
    """(params, time) -> log-SNR, one function for each network, so that it is compiled once."""
    return lambda params, time: noise_schedule.apply({"params": params}, time)


def pick(registry: Mapping[str, Any] | Sequence[str], name: str, setting: str) -> Any:
    """The entry of a registry, or an error that lists the known names and the likely one."""
    if name in registry:
        return registry[name] if isinstance(registry, Mapping) else name
    close = difflib.get_close_matches(str(name), registry, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{setting} = {name!r} is unknown; known: {', '.join(registry)}{hint}")


def load_data(config: ConfigDict, split: str, choose: data.Choose | None = None) -> data.Dataset:
    """A split of the config's data set, decoded; with labels where the model is given them.

    Args:
      config: the config.
      split: train, validation or test.
      choose: `data.first` or `data.some` of its examples; None: all.

    Raises:
      ConfigError: also if a class-conditional model meets an example without a label.
    """
    examples = data.load(**_data_arguments(config), split=split, choose=choose)
    return with_labels(config, examples, split)


def with_labels(config: ConfigDict, examples: Labelled, split: str) -> Labelled:
    """A data set, or some examples of it, with labels where the model is given them.

    Raises:
      ConfigError: if a class-conditional model meets an example without a label.
    """
    if not config.model.class_conditional:
        return examples._replace(labels=None)
    if examples.labels is None or examples.labels.min() < 0:
        raise ConfigError(_unlabelled(config, split))
    return examples


def load_measured(
    config: ConfigDict, split: str, choose: data.Choose | None = None
) -> data.Dataset:
    """A split, or some of it, as it is measured: with labels unless `evaluate.labels` withholds."""
    dataset = load_data(config, split, choose)
    return dataset if config.evaluate.labels else dataset._replace(labels=None)


def check_labels(config: ConfigDict) -> None:
    """Raises ConfigError if the labels are withheld from a network that always had them."""
    withheld = config.model.class_conditional and not config.evaluate.labels
    if withheld and config.train.label_dropout == 0:
        raise ConfigError(
            "config.evaluate.labels = False, but with config.train.label_dropout = 0 the network "
            "has learned nothing of examples without a label; use True"
        )


def _unlabelled(config: ConfigDict, split: str) -> str:
    return (
        f"config.model.class_conditional = True: not every example of {config.data.name}, {split}, "
        "has a label; use False, or a set with labels"
    )


def describe_data(config: ConfigDict, split: str) -> data.Source:
    """A split of the config's data set, found but not decoded."""
    return data.describe(**_data_arguments(config), split=split)


def check_split(config: ConfigDict, split: str) -> data.Source:
    """A split that is to be measured with the model, found but not decoded.

    Raises:
      ConfigError: also if its images are not of the training split's kind.
    """
    train, found = describe_data(config, "train"), describe_data(config, split)
    for name, what in (("image_shape", "images of shape"), ("num_levels", "grey levels:")):
        here, there = getattr(found, name), getattr(train, name)
        if here != there:
            raise ConfigError(
                f"config.data.name = {config.data.name!r}: {split} has {what} {here}, train "
                f"{there}; the model is made for those of train"
            )
    if config.model.class_conditional and not found.num_classes:
        raise ConfigError(_unlabelled(config, split))
    return found


def _data_arguments(config: ConfigDict) -> dict[str, Any]:
    return {
        "name": config.data.name,
        "data_dir": config.data.data_dir,
        "splits": config.data.splits,
        "options": data.Options.of(config.data),
    }


def check_positive(config: ConfigDict, *names: str) -> None:
    """Raises ConfigError unless each of these settings is at least 1."""
    for name in names:
        check_setting(config, name, lambda value: value >= 1, "it must be at least 1")


def value_of(config: ConfigDict, name: str) -> Any:
    """The value of a setting, such as "train.beta2"."""
    for part in name.split("."):
        config = config[part]
    return config


def check_setting(
    config: ConfigDict, name: str, is_right: Callable[[Any], bool], remedy: str
) -> None:
    """Raises ConfigError with the remedy unless the setting, such as "train.beta2", is right."""
    value = value_of(config, name)
    if not is_right(value):
        raise ConfigError(f"config.{name} = {value}; {remedy}")


def _unet(config: ConfigDict, schedule: Schedule, out_channels: int, num_classes: int) -> nn.Module:
    settings = config.to_dict()
    inputs = {
        "log_snr": lambda: log_snr_to_timestep,
        "ddpm_timestep": lambda: ddpm_timestep(schedule.knots),
    }
    if settings["noise_input"] == "ddpm_timestep" and len(schedule.knots) < 3:
        raise ConfigError(
            "config.model.unet.noise_input = 'ddpm_timestep' needs a schedule with a table of β, "
            "such as linear_beta; use log_snr"
        )
    noise_input = pick(inputs, settings.pop("noise_input"), "config.model.unet.noise_input")
    return UNet(
        **settings, out_channels=out_channels, num_classes=num_classes, timestep_of=noise_input()
    )


MODELS = {"unet": _unet}


TIMESTEPS = (*TIMES, "importance")
TIME = ("discrete", "continuous")


def build(config: ConfigDict) -> Problem:
    """Everything the config names, checked before anything is compiled.

    The shape of the images and their number of grey levels are the training split's.

    Raises:
      ConfigError: for a setting that is unknown or does not fit the others.
    """
    make_model = pick(MODELS, config.model.name, "config.model.name")
    make_decoder = pick(DECODERS, config.decoder.name, "config.decoder.name")
    pick(SCALINGS, config.decoder.scaling, "config.decoder.scaling")
    pick(PARAMETERIZATIONS, config.model.parameterization, "config.model.parameterization")
    variance = pick(VARIANCES, config.model.variance, "config.model.variance")()
    pick(X_0_TREATMENTS, config.sample.x_0_treatment, "config.sample.x_0_treatment")
    gaussian = config.decoder.discretized_gaussian
    pick(FIRST_VARIANCES, gaussian.variance, "config.decoder.discretized_gaussian.variance")

    check_setting(config, "seed", lambda seed: 0 <= seed < 2**32, "it must be in [0, 2³²)")
    check_positive(config, "schedule.num_timesteps")
    source = describe_data(config, "train")
    if config.model.class_conditional and not source.num_classes:
        raise ConfigError(_unlabelled(config, "train"))
    num_classes = source.num_classes if config.model.class_conditional else 0
    quantization = Quantization(source.num_levels, config.decoder.scaling)
    schedule, levels, noise_schedule = _schedule(config)
    make_objective(config)
    try:
        out_channels = source.image_shape[-1] * (2 if variance.is_learned else 1)
        network = make_model(config.model[config.model.name], schedule, out_channels, num_classes)
        network.validate(source.image_shape)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from error
    return Problem(
        schedule=schedule,
        levels=levels,
        noise_schedule=noise_schedule,
        network=network,
        parameterization=config.model.parameterization,
        variance=variance,
        quantization=quantization,
        decoder=make_decoder(quantization, **config.decoder[config.decoder.name]),
        image_shape=source.image_shape,
        num_classes=num_classes,
    )


def _schedule(config: ConfigDict) -> tuple[Schedule, Levels, NoiseSchedule | None]:
    """The schedule, its T levels, and its network where it is learned."""
    name = config.schedule.name
    pick((*SCHEDULES, "learned"), name, "config.schedule.name")
    arguments, noise_schedule = config.schedule[name], None
    try:
        if name == "learned":
            noise_schedule = NoiseSchedule(**arguments)
            noise_schedule.validate()
            schedule = linear_log_snr(arguments.max, arguments.min)
        else:
            schedule = SCHEDULES[name](**arguments)
        return schedule, schedule.levels(config.schedule.num_timesteps), noise_schedule
    except ValueError as error:
        message = str(error).removeprefix("schedule.learned.")
        raise ConfigError(f"config.schedule.{name}: {message}") from error


def make_objective(config: ConfigDict) -> Objective:
    """The training loss that the config names.

    Raises:
      ConfigError: for an unknown one, or for settings that have no meaning together.
    """
    name = config.train.objective
    factory = pick(OBJECTIVES, name, "config.train.objective")
    pick(TIMESTEPS, config.train.timesteps, "config.train.timesteps")
    pick(TIME, config.train.time, "config.train.time")
    continuous, is_learned = config.train.time == "continuous", config.schedule.name == "learned"
    first = config.decoder.discretized_gaussian.variance
    wrong = {
        f"config.train.time = {config.train.time!r} trains no schedule; with "
        "config.schedule.name = 'learned' use continuous": is_learned and not continuous,
        f"config.train.objective = {name!r} does not tell a schedule's variance; with "
        "config.schedule.name = 'learned' use vlb": is_learned and name != "vlb",
        f"config.train.objective = {name!r} has no continuous time; use "
        "config.train.time=discrete": continuous and name == "hybrid",
        "config.train.timesteps = 'importance' is of discrete timesteps; in continuous time learn "
        "the schedule, or use stratified": continuous and config.train.timesteps == "importance",
        f"config.train.objective = 'hybrid' trains a learned variance; config.model.variance = "
        f"{config.model.variance!r} is fixed": name == "hybrid"
        and not VARIANCES[config.model.variance]().is_learned,
        "config.decoder.discretized_gaussian.variance = 'beta_tilde' depends on T; in continuous "
        "time use beta": continuous
        and name == "vlb"
        and config.decoder.name == "discretized_gaussian"
        and first == "beta_tilde",
        "config.schedule.num_timesteps = 1 has no continuous time; use at least 2": continuous
        and config.schedule.num_timesteps < 2,
        f"config.model.variance = {config.model.variance!r} is not trained by "
        f"config.train.objective = {name!r} in {config.train.time} time; use vlb or hybrid, with "
        "config.train.time=discrete": VARIANCES[config.model.variance]().is_learned
        and (continuous or name not in ("vlb", "hybrid")),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(message)
    for option, is_right, remedy in (
        ("min_snr.gamma", lambda x: x > 0, "it must be positive"),
        ("p2.k", lambda x: x > 0, "it must be positive"),
        ("hybrid.vlb_weight", lambda x: x >= 0, "it must not be negative"),
    ):
        check_setting(config, f"train.{option}", is_right, remedy)
    return factory(**config.train.get(name, {}))
