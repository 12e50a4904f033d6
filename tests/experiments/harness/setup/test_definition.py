"""Configs: that every one of them builds, survives a file, and names what is wrong with it."""

import importlib.util
import itertools
import pathlib

import jax
import numpy as np
import pytest

from configs import base, cifar10, digits, recorded
from diffusion.schedules import SCHEDULES
from experiments.harness.errors import ConfigError
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.params import abstract_params
from experiments.harness.workdir import provenance, record
from tests.experiments import tiny
from tests.experiments.harness.data.test_data_arrays import write_idx
from tests.mock_cifar10 import mock_tfds

CONFIGS = pathlib.Path(__file__).parents[4] / "configs"
NAMES = sorted(
    path.stem for path in CONFIGS.glob("[!_]*.py") if path.stem not in ("base", "recorded")
)


def load(name):
    """As the command line does, from the file."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def typed(config):
    """Every setting by its full name, with its type."""
    flat = provenance.flatten(config.to_dict())
    for name in flat:
        value = config
        for part in name.split("."):
            value = value[part]
        flat[name] = (type(value), value)
    return flat


def test_there_are_configs():
    assert {"digits", "cifar10"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds(name, tmp_path):
    config = load(name)
    if config.data.name == "idx":  # Fashion-MNIST's files need not be on the machine
        for stem, count in (("train", 24), ("t10k", 4)):
            write_idx(tmp_path / f"{stem}-images-idx3-ubyte", np.zeros((count, 28, 28)))
            write_idx(tmp_path / f"{stem}-labels-idx1-ubyte", np.zeros(count))
        config.data.data_dir = str(tmp_path)
    with mock_tfds(num_examples=4):
        definition = define_model(config)
    assert definition.levels.num_timesteps == load(name).schedule.num_timesteps
    params = abstract_params(definition)
    x_t = jax.ShapeDtypeStruct((2, *definition.image_shape), np.float32)
    log_snr = jax.ShapeDtypeStruct((2,), np.float32)
    outputs = jax.eval_shape(
        lambda p, x, l: definition.model(p).reverse.outputs(x, l), params, x_t, log_snr
    )
    assert outputs.prediction.shape == x_t.shape
    assert (outputs.extra is not None) == definition.variance.is_learned


@pytest.mark.parametrize("name", NAMES)
def test_every_config_differs_from_the_base_only_in_values(name):
    """Same names, same types: whatever a config sets can be overridden in every other."""
    expected = {key: kind for key, (kind, _) in typed(base.get_config()).items()}
    assert {key: kind for key, (kind, _) in typed(load(name)).items()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_locked(name):
    config = load(name)
    with pytest.raises(AttributeError):
        config.train.batchsize = 3
    with pytest.raises(KeyError):
        config.update_from_flattened_dict({"schedul.name": "cosine"})


@pytest.mark.parametrize("name", NAMES)
def test_every_docstring_gives_the_command(name):
    assert f"--config=configs/{name}.py --workdir=" in (CONFIGS / f"{name}.py").read_text()


def changed():
    config = digits.get_config()
    config.schedule.betas.betas = (1e-4, 0.25, 0.5)
    config.schedule.linear_log_snr.max = 7
    config.model.unet.attention_resolutions = ()
    config.data.flip = True
    config.seed = 2**31
    config.train.learning_rate = 1 / 3
    config.data.splits.test = "test[:10%]"
    return config


@pytest.mark.parametrize("make", [base.get_config, digits.get_config, cifar10.get_config, changed])
def test_a_recorded_config_comes_back_as_it_was(make, tmp_path):
    """With every type: a float that is a whole number, an empty tuple, a tuple of floats."""
    record.record(make(), tmp_path)
    back = recorded.get_config(str(tmp_path))
    assert typed(back) == typed(make())
    assert back.is_locked
    record.check(back, tmp_path)
    record.record(back, tmp_path)
    assert typed(recorded.get_config(str(tmp_path))) == typed(make())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 1000])
def test_every_schedule_builds_at_any_number_of_timesteps(name, num_timesteps):
    config = tiny.config(schedule__name=name, schedule__num_timesteps=num_timesteps)
    config.schedule.betas.betas = tuple(np.linspace(0.1, 0.5, 1000).tolist())
    levels = define_model(config).levels
    assert levels.num_timesteps == num_timesteps
    assert np.isfinite(levels.log_snr[1:]).all()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"num_timesteps": 0}, "num_timesteps = 0"),
        ({"num_timesteps": -5}, "num_timesteps = -5"),
        ({"name": "linear_beta", "linear_beta__beta_end": 1.0}, "beta_1000 = 1"),
        ({"name": "linear_beta", "linear_beta__beta_start": 0.0}, "beta_1 = 0"),
        ({"name": "linear_beta", "linear_beta__native_timesteps": 0}, "betas"),
        ({"name": "betas"}, "betas"),
        ({"name": "betas", "betas__betas": (0.1, 1.5)}, "beta_2 = 1.5"),
        ({"linear_log_snr__max": -5.0}, "max = -5"),
    ],
)
def test_a_schedule_that_is_none_is_named(overrides, named):
    config = tiny.config(**{f"schedule__{name}": value for name, value in overrides.items()})
    with tiny.refused(named, match=r"^config\.schedule\."):
        define_model(config)


def test_harmless_settings_may_change_and_others_may_not(tmp_path):
    """Each of all settings on its own, with no other change."""

    def constant():
        config = digits.get_config()
        config.train.decay = "constant"
        return config

    record.record(constant(), tmp_path)
    # The check asks only whether there is a checkpoint, so a small one will do.
    tiny.untrained(tmp_path, tiny.config())
    flat = provenance.flatten(constant().to_dict())
    change = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 1, str: "x".__add__}
    messages = {}
    for name, value in flat.items():
        other = constant()
        value = (*value, 5) if isinstance(value, list) else change[type(value)](value)
        value = {"schedule.betas.betas": (0.5,), "train.allow_changes": ("seed",)}.get(name, value)
        other.update_from_flattened_dict({name: value})
        try:
            record.check(other, tmp_path)
        except ConfigError as error:
            messages[name] = str(error)
    for name, message in messages.items():
        assert f"{name} was {flat[name]!r}, now " in message
        assert message.count(" was ") == 1
    refused = set(messages)
    allowed = set(flat) - refused
    # Whatever makes the parameters what they are …
    for prefix in ("seed", "data.name", "data.flip", "schedule", "model", "train.learning_rate"):
        assert any(name.startswith(prefix) for name in refused)
        assert not any(name.startswith(prefix) for name in allowed)
    # … and what does not.
    assert {name for name in flat if name.startswith(("evaluate.", "sample."))} <= allowed
    assert {"train.num_steps", "train.log_every", "train.checkpoint_every"} <= allowed
    assert {"train.batch_size", "train.init_from", "train.objective", "train.ema_decay"} <= refused


def test_a_directory_is_found_out_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("kept")
    for beneath in ("file", "file/run", "file/run/deeper"):
        with pytest.raises(ConfigError, match=r"workdir=.*file is a file"):
            record.check(digits.get_config(), tmp_path / beneath)
    record.check(digits.get_config(), tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_flattened_names_are_paths():
    tree = {"a": 1, "b": {"c": (1, 2), "d": {"e": "x"}}}
    assert provenance.flatten(tree) == {"a": 1, "b.c": [1, 2], "b.d.e": "x"}
    names = list(provenance.flatten(base.get_config().to_dict()))
    assert len(names) == len(set(names)) > 40
    assert not any(b.startswith(a + ".") for a, b in itertools.permutations(names, 2))
