"""Checks of a config: each setting against its declaration, and settings against one another.

`check` runs once at the start of an experiment. What needs the data or the devices is checked where
they are described: shapes, labels, splits and batches.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs.base import SETTINGS
from configs.settings.declaration import problems, shown, unknown, value_of
from diffusion.variances import VARIANCES
from experiments.harness.errors import ConfigError


class Rule(NamedTuple):
    """Settings that do not work together.

    Attributes:
      parts: the experiments that the rule applies to.
      setting: the setting that the error line names.
      is_violated: whether a config has such settings.
      remedy: what would be right; other settings' values stand in braces, as in {train.num_steps}.
    """

    parts: tuple[str, ...]
    setting: str
    is_violated: Callable[[ConfigDict], bool]
    remedy: str


def check(config: ConfigDict, *parts: str) -> None:
    """Checks every setting on its own, and those of some experiments against one another.

    Args:
      config: the config.
      parts: names of experiments: train, evaluate, sample, variance, sigma, spacing, compress or
        ablate.

    Raises:
      ConfigError: with one line that names the setting, its value and what would be right.
    """
    for problem in problems(config, SETTINGS):
        raise ConfigError(problem)
    for rule in RULES:
        if set(parts) & set(rule.parts) and rule.is_violated(config):
            value, remedy = value_of(config, rule.setting), rule.remedy.format_map(config)
            raise ConfigError(f"config.{rule.setting} = {shown(value)}; {remedy}")


def pick(registry: Mapping[str, Any], name: str, setting: str) -> Any:
    """The entry of a registry, or an error that lists the known names and the likely one."""
    if name not in registry:
        raise ConfigError(f"{setting} = {name!r}{unknown(name, registry)}")
    return registry[name]


def _is_learned(variance: str) -> bool:
    """Whether Σ_θ of this name is an output of the network."""
    return variance in VARIANCES and VARIANCES[variance]().is_learned


def _lacks(setting: str) -> Callable[[ConfigDict], bool]:
    """Whether a setting names a learned Σ_θ that the network was not trained with."""

    def is_violated(c: ConfigDict) -> bool:
        name = value_of(c, setting)
        return _is_learned(name) and name != c.model.variance

    return is_violated


def _needs_unconditional(c: ConfigDict) -> bool:
    """Whether a class-conditional network never learned to predict without a label."""
    return c.model.class_conditional and c.train.label_dropout == 0


TRAIN, EVALUATE, SAMPLE = ("train",), ("evaluate",), ("train", "sample")
MEASURE = ("evaluate", "variance", "sigma", "spacing", "compress", "ablate")
ALL = ("train", "sample", *MEASURE)
_TRAINED_WITH = (
    "a learned Σ_θ needs a network that was trained with it, and this one has "
    "config.model.variance = {model.variance!r}; use that, a fixed or an analytic one"
)
_LABELS = "the model has no classes; train with config.model.class_conditional = True"
_WITHOUT_LABELS = (
    "it needs predictions without a label, which a network with config.train.label_dropout = 0 "
    "never learned"
)

# fmt: off
RULES = (
    Rule(ALL, "data.image_size", lambda c: c.data.name == "folder" and not c.data.image_size,
         "give the side in pixels that the images of a folder shall have"),
    Rule(TRAIN, "train.time", lambda c: c.schedule.name == "learned"
         and c.train.time != "continuous",
         "with config.schedule.name = 'learned' use continuous"),
    Rule(TRAIN, "train.objective", lambda c: c.schedule.name == "learned"
         and c.train.objective != "vlb",
         "its variance says nothing of the bound's; with config.schedule.name = 'learned' use vlb"),
    Rule(TRAIN, "train.objective", lambda c: c.train.time == "continuous"
         and c.train.objective == "hybrid",
         "it has no continuous time; use config.train.time = 'discrete'"),
    Rule(TRAIN, "train.timesteps", lambda c: c.train.time == "continuous"
         and c.train.timesteps == "importance",
         "it needs discrete timesteps; in continuous time learn the schedule, or use stratified"),
    Rule(TRAIN, "train.objective", lambda c: c.train.objective == "hybrid"
         and not _is_learned(c.model.variance),
         "it trains a learned Σ_θ, but config.model.variance = {model.variance!r} is fixed"),
    Rule(TRAIN, "schedule.num_timesteps", lambda c: c.train.time == "continuous"
         and c.schedule.num_timesteps < 2,
         "continuous time needs both ends of the schedule; use at least 2"),
    Rule(TRAIN, "model.variance", lambda c: _is_learned(c.model.variance)
         and (c.train.time == "continuous" or c.train.objective not in ("vlb", "hybrid")),
         "config.train.objective = {train.objective!r} does not train it in {train.time} time; use "
         "vlb or hybrid, with config.train.time = 'discrete'"),
    Rule(TRAIN, "train.weight_decay", lambda c: c.train.weight_decay
         and c.train.optimizer != "adamw",
         "it has no effect with config.train.optimizer = {train.optimizer!r}; use adamw"),
    Rule(TRAIN, "train.warmup_steps", lambda c: c.train.warmup_steps > c.train.num_steps,
         "it must be at most config.train.num_steps = {train.num_steps}, the length of the run"),
    Rule(TRAIN, "train.accumulate", lambda c: c.train.accumulate > 1
         and c.schedule.name == "learned",
         "the gradient of a learned schedule is that of a whole batch; use 1"),
    *(Rule(TRAIN, "train.steps_per_dispatch", lambda c, name=name:
           c.train[name] % c.train.steps_per_dispatch != 0,
           f"it must divide config.train.{name} = {{train.{name}}}")
      for name in ("log_every", "checkpoint_every", "sample_every", "num_steps")),

    Rule(MEASURE, "evaluate.labels", lambda c: not c.evaluate.labels and _needs_unconditional(c),
         f"{_WITHOUT_LABELS}; use True"),
    Rule(("evaluate", "ablate"), "evaluate.variance", _lacks("evaluate.variance"), _TRAINED_WITH),
    Rule(("evaluate", "sample"), "sample.variance", _lacks("sample.variance"), _TRAINED_WITH),
    *(Rule((name,), f"{name}.variance", _lacks(f"{name}.variance"), _TRAINED_WITH)
      for name in ("spacing", "compress")),
    Rule(EVALUATE, "schedule.num_timesteps", lambda c: "continuous" in c.evaluate.also
         and c.schedule.num_timesteps < 2, "the bound as T → ∞ needs at least 2"),
    Rule(EVALUATE, "evaluate.also", lambda c: "ode" in c.evaluate.also
         and importlib.util.find_spec("diffrax") is None, "ode needs the package diffrax >= 0.7"),
    Rule(EVALUATE, "evaluate.ode.num_steps", lambda c: c.evaluate.ode.num_steps % 2 == 1,
         "it must be even, or 0 for an adaptive solve"),

    Rule(SAMPLE, "sample.labels", lambda c: c.sample.labels and not c.model.class_conditional,
         _LABELS),
    Rule(SAMPLE, "sample.guidance.scale", lambda c: c.sample.guidance.scale != 1
         and not c.model.class_conditional, f"use 1: {_LABELS}"),
    Rule(SAMPLE, "sample.guidance.scale", lambda c: c.sample.guidance.scale != 1
         and _needs_unconditional(c), _WITHOUT_LABELS),
    Rule(SAMPLE, "sample.guidance.min_log_snr", lambda c: c.sample.guidance.min_log_snr
         > c.sample.guidance.max_log_snr,
         "it must not exceed config.sample.guidance.max_log_snr = {sample.guidance.max_log_snr}"),
    Rule(("sample",), "sample.also", lambda c: "guidance" in c.sample.also
         and not c.model.class_conditional,
         f"guidance needs labels: {_LABELS}, as configs/digits_class.py does"),
    Rule(("sample",), "sample.guidance.scales", lambda c: "guidance" in c.sample.also
         and set(c.sample.guidance.scales) != {1} and _needs_unconditional(c), _WITHOUT_LABELS),
    Rule(("sample",), "sample.also", lambda c: "interpolate" in c.sample.also
         and _needs_unconditional(c), f"interpolate: {_WITHOUT_LABELS}"),
    Rule(("evaluate", "sample"), "quality.neighbors", lambda c: c.quality.neighbors
         >= min(c.quality.num_samples, c.quality.max_pairs),
         "it must be below config.quality.num_samples = {quality.num_samples} and "
         "config.quality.max_pairs = {quality.max_pairs}"),

    Rule(("variance",), "schedule.num_timesteps", lambda c: c.schedule.num_timesteps < 2,
         "it must be at least 2"),
    Rule(("ablate",), "schedule.num_timesteps", lambda c: c.schedule.num_timesteps < 2,
         "it must be at least 2"),
    Rule(("ablate",), "ablate.num_timesteps", lambda c: c.ablate.num_timesteps == 1,
         "it must be at least 2, or 0 for config.schedule.num_timesteps"),
    Rule(("ablate",), "sample.spacing", lambda c: "quality" in c.ablate.measures
         and c.sample.spacing == "bound_optimal",
         "a cell has no result of --experiment=spacing; use another"),
    Rule(("spacing",), "spacing.candidates", lambda c: c.spacing.candidates
         < max(c.spacing.num_timesteps),
         "it must be at least the largest of config.spacing.num_timesteps = "
         "{spacing.num_timesteps}"),
)
# fmt: on
