"""Estimates of memory: they refuse what can't fit and nothing that runs."""

import jax
import pytest

from experiments.harness import memory
from experiments.harness.errors import ConfigError
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.params import abstract_params
from tests.experiments import tiny

ALL = ("train", "evaluate", "sample", "variance", "sigma", "spacing")
IMAGE_SHAPE = (8, 8, 1)


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [
        ("train", "model.unet.channels", 65536),
        ("evaluate", "evaluate.batch_size", 10**7),
        ("evaluate", "evaluate.chunk_size", 10**7),
        ("sample", "sample.num_samples", 10**9),
        ("sample", "sample.strip_columns", 10**4),
        ("sample", "quality.num_samples", 10**9),
        ("spacing", "spacing.candidates", 10**6),
    ],
)
def test_a_size_that_cannot_fit_is_one_line(part, setting, value, monkeypatch):
    monkeypatch.setattr(memory, "host_bytes", lambda: memory.GIBIBYTE)
    monkeypatch.setattr(memory, "device_bytes", lambda: memory.GIBIBYTE)
    overrides = {setting.replace(".", "__"): value}
    if setting.startswith("quality."):
        overrides["sample__also"] = ("sweep",)
    config = tiny.config("unet", sample__strip_rows=10**3, **overrides)
    with pytest.raises(ConfigError) as error:
        memory.check_memory(config, IMAGE_SHAPE, part)
    line = str(error.value)
    assert line.startswith(f"config.{setting} = {value} needs at least ")
    assert "has 1 GiB; use a smaller value" in line


def test_a_small_run_fits_into_little(monkeypatch):
    monkeypatch.setattr(memory, "host_bytes", lambda: 2**24)
    monkeypatch.setattr(memory, "device_bytes", lambda: 2**24)
    memory.check_memory(tiny.config("unet"), IMAGE_SHAPE, *ALL)


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 3, 2)])
@pytest.mark.parametrize("num_res_blocks", [1, 3])
def test_the_estimated_parameters_are_a_lower_bound(multipliers, num_res_blocks):
    """And more than an eighth of the true number."""
    config = tiny.config(
        "unet",
        model__unet__channels=16,
        model__unet__channel_multipliers=multipliers,
        model__unet__num_res_blocks=num_res_blocks,
    )
    config.model.unet.attention_resolutions = ()
    network = abstract_params(define_model(config))["network"]
    number = sum(leaf.size for leaf in jax.tree.leaves(network))
    assert number / 8 < memory.unet_parameters(config.model.unet) < number
