"""Checks of a config: every kind of wrong value is one line that names its setting."""

import functools
import math

import pytest
from ml_collections import ConfigDict

from configs import base, digits
from configs.settings.declaration import Bool, Choice, Float, Int, Text, Tuple
from diffusion.samplers.registry import SAMPLERS
from diffusion.schedules import SCHEDULES, linear_log_snr
from experiments.harness import checks
from experiments.harness.errors import ConfigError
from experiments.harness.setup.definition import define_model
from tests.experiments import tiny

SETTINGS = dict(base.SETTINGS.flat())
PARTS = ("train", "evaluate", "sample", "variance", "sigma", "spacing")


def wrong_values(kind):
    """By what is wrong with them, values that a kind must refuse."""
    if isinstance(kind, Tuple):
        wrong = {"no tuple": 2, "a list": [1], "text": "(1, 2)"}
        entries = wrong_values(kind.element)
        return wrong | {f"an entry: {what}": (entry,) for what, entry in entries.items()}
    wrong = {"none": None, "a tuple": (1,), "a group": ConfigDict({"a": 1})}
    if not isinstance(kind, Text):
        wrong["text"] = "nonsense"
    if not isinstance(kind, Bool):
        wrong["a bool"] = True
    if not isinstance(kind, Float):
        wrong["a float"] = 1.5
    if isinstance(kind, Int):
        wrong["a whole float"] = 8.0
    if isinstance(kind, Text | Bool):
        wrong["a number"] = 1
    wrong |= {"NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf}
    if isinstance(kind, Int):
        wrong |= {"far above": 10**30, "far below": -(10**30)}
    if isinstance(kind, Float) and kind != Float():
        low, high = (float(end) for end in kind.interval[1:-1].split(","))
        beyond = {"below": low - 1, "above": high + 1}
        beyond |= {"low end": low} if kind.interval[0] == "(" else {}
        beyond |= {"high end": high} if kind.interval[-1] == ")" else {}
        wrong |= beyond
    return wrong


def changed(name, value, config=None):
    """A config in which a setting has a value, of whatever type."""
    tree = (config or base.get_config()).to_dict()
    *path, last = name.split(".")
    functools.reduce(dict.get, path, tree)[last] = value
    return ConfigDict(tree, type_safe=False)


def line_of(config, *parts):
    """The one line with which a config is refused."""
    with pytest.raises(ConfigError) as error:
        checks.check(config, *parts)
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", SETTINGS)
def test_every_kind_of_wrong_value_is_a_line_that_names_the_setting(name):
    for what, value in wrong_values(SETTINGS[name].kind).items():
        line = line_of(changed(name, value))
        assert line.startswith(f"config.{name} = "), what
        assert any(end in line for end in ("must be", "is unknown; known: ", "is no setting")), what


@pytest.mark.parametrize("name", SETTINGS)
def test_every_default_and_both_closed_ends_are_permitted(name):
    kind, values = SETTINGS[name].kind, [SETTINGS[name].default]
    if isinstance(kind, Choice):
        values += kind.choices()
    if isinstance(kind, Float):
        values += [0.25, *([1] if kind.problem(1.0) is None else [])]
    for value in values:
        checks.check(changed(name, value))


def test_a_whole_number_is_a_float_and_not_the_reverse():
    checks.check(changed("train.learning_rate", 1))
    line = line_of(changed("train.num_steps", 10.0))
    assert line.startswith("config.train.num_steps = 10.0; it must be a whole number")


@pytest.mark.parametrize(
    ("name", "value", "end"),
    [
        ("model.unet.channel_multipliers", 2, "a tuple of at least 1; each entry a number"),
        ("model.unet.fourier_exponents", 3, "it must be a tuple; each entry a whole number"),
        ("model.unet.channel_multipliers", (0.5,), ": entry 0.5; it must be a number in [1, 1024]"),
        ("model.unet.attention_resolutions", (1.5,), ": entry 1.5; it must be a whole number"),
        ("sample.labels", ("one",), ": entry 'one'; it must be a whole number"),
        ("schedule.betas.betas", (0.1, math.nan), ": entry nan; it must be a number in (0, 1)"),
        ("train.allow_changes", ("seeed",), "entry 'seeed' is no setting; did you mean seed?"),
        ("data.channels", 7, "is unknown; known: 1, 3"),
        ("data.image_size", -8, "it must be a whole number in [0, 16384]"),
        ("schedule.num_timesteps", 10**14, "it must be a whole number in [1, 10^7]"),
        ("schedule.cosine.native_timesteps", 10**9, "it must be a whole number in [1, 10^7]"),
        ("model.unet.channels", 400_000, "it must be a whole number in [4, 65536]"),
        ("train.learning_rate", -1.0, "it must be a finite number, at least 0"),
        ("quality.num_samples", 99, "it must be a whole number in [100, 10^9]"),
    ],
)
def test_a_line_says_what_would_be_right(name, value, end):
    line = line_of(changed(name, value))
    assert line.startswith(f"config.{name} = {value!r}")
    assert end in line


def names():
    for name, setting in SETTINGS.items():
        kind = setting.kind
        is_tuple = isinstance(kind, Tuple)
        kind = kind.element if is_tuple else kind
        if isinstance(kind, Choice) and isinstance(kind.choices()[0], str):
            yield pytest.param(name, kind, is_tuple, id=name)


@pytest.mark.parametrize(("name", "kind", "is_tuple"), list(names()))
def test_an_unknown_name_gets_the_known_ones_and_the_likely_one(name, kind, is_tuple):
    for choice in filter(None, kind.choices()):
        misspelt = choice + choice[-1]
        line = line_of(changed(name, (misspelt,) if is_tuple else misspelt))
        assert all(known in line for known in kind.choices())
        assert line.endswith(f"did you mean {choice}?")


def test_a_name_that_resembles_nothing_gets_no_suggestion():
    assert "did you mean" not in line_of(changed("schedule.name", "xyz"))


def test_a_name_that_a_notebook_registers_is_known_at_once(monkeypatch):
    """With a group of options of that name or without."""
    config = changed("schedule.name", "mine", tiny.config())
    assert "config.schedule.name = 'mine' is unknown" in line_of(config)
    monkeypatch.setitem(SCHEDULES, "mine", lambda top=5.0: linear_log_snr(top, -5.0))
    checks.check(config, *PARTS)
    assert define_model(config).levels.log_snr[1] == 5.0
    config = changed("schedule.mine", {"top": 6.0}, config)
    checks.check(config, *PARTS)
    assert define_model(config).levels.log_snr[1] == 6.0
    config.schedule.mine.top = math.nan
    assert line_of(config) == "config.schedule.mine.top = nan; it must be a finite number"


def test_an_undeclared_name_is_refused():
    assert line_of(changed("train.batchsize", 3)).startswith(
        "config.train.batchsize is no setting; did you mean config.train.batch_size?"
    )
    assert line_of(changed("schedule.cosin", {"offset": 0.1})).startswith(
        "config.schedule.cosin is no setting"
    )
    config = base.get_config()
    with config.unlocked():
        del config.train.num_steps
    assert line_of(config).startswith("config.train.num_steps is missing")
    assert "it must be a group of settings" in line_of(changed("schedule.cosine", 3))


LEARNED, CONTINUOUS = {"schedule__name": "learned"}, {"train__time": "continuous"}
LABELLED = {
    "model__class_conditional": True,
    "train__label_dropout": 0.0,
}  # never trained without a label
VIOLATIONS = [
    ("all", {"data__name": "folder"}, "data.image_size = 0"),
    ("train", LEARNED, "train.time = 'discrete'"),
    ("train", LEARNED | CONTINUOUS | {"train__objective": "simple"}, "train.objective = 'simple'"),
    ("train", CONTINUOUS | {"train__objective": "hybrid"}, "train.objective = 'hybrid'"),
    ("train", CONTINUOUS | {"train__timesteps": "importance"}, "train.timesteps = 'importance'"),
    ("train", {"train__objective": "hybrid"}, "train.objective = 'hybrid'"),
    ("train", CONTINUOUS | {"schedule__num_timesteps": 1}, "schedule.num_timesteps = 1"),
    (
        "train",
        {"model__variance": "learned_range", "train__objective": "simple"},
        "model.variance = 'learned_range'",
    ),
    ("train", {"train__weight_decay": 0.1}, "train.weight_decay = 0.1"),
    ("train", {"train__warmup_steps": 13}, "train.warmup_steps = 13"),
    ("train", LEARNED | CONTINUOUS | {"train__accumulate": 2}, "train.accumulate = 2"),
    (
        "train",
        {"train__steps_per_dispatch": 3, "train__log_every": 3},
        "train.steps_per_dispatch = 3",
    ),
    ("evaluate", LABELLED | {"evaluate__labels": False}, "evaluate.labels = False"),
    ("evaluate", {"evaluate__variance": "learned_range"}, "evaluate.variance = 'learned_range'"),
    ("sample", {"sample__variance": "learned_range"}, "sample.variance = 'learned_range'"),
    ("spacing", {"spacing__variance": "learned_diagonal"}, "spacing.variance = 'learned_diagonal'"),
    (
        "evaluate",
        {"evaluate__also": ("continuous",), "schedule__num_timesteps": 1},
        "schedule.num_timesteps = 1",
    ),
    ("evaluate", {"evaluate__ode__num_steps": 7}, "evaluate.ode.num_steps = 7"),
    ("evaluate", {"quality__neighbors": 1000}, "quality.neighbors = 1000"),
    ("sample", {"sample__labels": (1,)}, "sample.labels = (1,)"),
    ("sample", {"sample__guidance__scale": 2.0}, "sample.guidance.scale = 2.0"),
    ("sample", LABELLED | {"sample__guidance__scale": 2.0}, "sample.guidance.scale = 2.0"),
    ("sample", {"sample__guidance__min_log_snr": 101.0}, "sample.guidance.min_log_snr = 101.0"),
    ("sample", {"sample__also": ("guidance",)}, "sample.also = ('guidance',)"),
    (
        "sample",
        LABELLED | {"sample__also": ("guidance",)},
        "sample.guidance.scales = (0.0, 1.0, 2.0, 4.0, 8.0)",
    ),
    ("sample", LABELLED | {"sample__also": ("interpolate",)}, "sample.also = ('interpolate',)"),
    ("variance", {"schedule__num_timesteps": 1}, "schedule.num_timesteps = 1"),
    ("spacing", {"spacing__candidates": 49}, "spacing.candidates = 49"),
]


@pytest.mark.parametrize(("part", "overrides", "start"), VIOLATIONS)
def test_settings_that_do_not_work_together_are_one_line(part, overrides, start):
    parts = PARTS if part == "all" else (part,)
    checks.check(tiny.config(), *parts)
    assert line_of(tiny.config(**overrides), *parts).startswith(f"config.{start}; ")


def test_a_sampler_without_options_is_no_group():
    assert set(SAMPLERS) - set(base.get_config().sample)


def test_the_digits_pass_every_check():
    checks.check(digits.get_config(), *PARTS)
