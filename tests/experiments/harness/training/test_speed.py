"""What a run says of its speed, and the trace of its steps."""

import types

import jax
import jax.numpy as jnp
import pytest

from experiments.harness import devices
from experiments.harness.errors import ConfigError
from experiments.harness.training import loop, speed
from tests.experiments import processes, tiny


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "float32", 494.7e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "bfloat16", 989.4e12),
        ("TPU v4", "float32", 275e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("cpu", "float32", None),
    ],
)
def test_the_peak_of_a_device_by_its_kind(kind, dtype, expected):
    assert speed.peak_flops(kind, dtype) == expected


def test_a_matrix_product_has_two_operations_for_each_term():
    m, k, n = 48, 40, 56
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((m, k), (k, n))]
    compiled = speed.Compiled(jax.jit(jnp.dot), *shapes)
    assert compiled.flops == 2 * m * k * n
    assert compiled.seconds > 0
    assert compiled.call(jnp.ones((m, k)), jnp.ones((k, n)))[0, 0] == k


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_counted_for_a_cpu_where_the_devices_do_not_count(accumulate):
    """Whole, and each part of its batch once."""
    whole = processes.Training(tiny.config(), devices.mesh())
    given = whole.batch(0)
    expected = speed.flops(whole.compiled.lower(whole.state, *given))
    # The convolution and its gradient, 8×8 pixels, 3×3 taps, three channels in and one out.
    assert expected > 2 * 16 * 64 * 9
    trainer = types.SimpleNamespace(
        config=tiny.config(train__accumulate=accumulate),
        definition=whole.definition,
        optimizer=whole.optimizer,
        feed=types.SimpleNamespace(streamed=False),
    )
    assert loop.Trainer.model_flops(trainer, None, whole.state, given) == expected


def test_rates_of_a_stretch_of_steps():
    """Ten steps of 32 images in five seconds, one of them waited, on a device half in use."""
    values = speed.Speed(32, flops=1e6, peak=4e6).values(10, 5.0, 1.0)
    values.pop("peak_memory_bytes", None)  # where a device tells it
    assert values == {
        "images_per_second": 64.0,
        "step_seconds": 0.5,
        "data_wait": 0.2,
        "flops_per_second": 2e6,
        "flop_utilization": 0.5,
    }
    assert "flop_utilization" not in speed.Speed(32, flops=1e6).values(10, 5.0, 1.0)
    assert speed.Speed(32).values(0, 0.0, 0.0) == {}


@pytest.mark.parametrize(("first", "expected"), [(1, [1, 2]), (4, [4])])
def test_a_trace_is_of_the_steps_that_were_chosen(first, expected, tmp_path, monkeypatch):
    """Also where the run ends before they do."""
    is_on, traced = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", is_on.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", is_on.clear)
    config = tiny.config(profile__first_step=first, profile__num_steps=2)
    with speed.Profile(config, tmp_path) as profile:
        for step in range(5):
            profile.before(step, jnp.zeros(()))
            assert is_on in ([], [str(tmp_path / "profile")])
            if is_on:
                traced.append(step)
    assert traced == expected
    assert not is_on


def test_where_steps_go_by_tens_a_trace_is_of_the_first_ten_that_are_due(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(jax.profiler, "start_trace", started.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: started.append("stopped"))
    config = tiny.config(profile__first_step=5, profile__num_steps=3)
    with speed.Profile(config, tmp_path) as profile:
        for step in range(0, 50, 10):
            profile.before(step, jnp.zeros(()))
            if step == 10:
                assert len(started) == 1
    assert started == [str(tmp_path / "profile"), "stopped"]


def test_a_run_that_ends_before_its_trace_says_so(tmp_path, capsys):
    with speed.Profile(tiny.config(profile__first_step=9, profile__num_steps=1), tmp_path) as of:
        of.before(0, jnp.zeros(()))
    assert "config.profile.first_step = 9" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()


def test_a_trace_is_written(tmp_path):
    config = tiny.config(profile__first_step=0, profile__num_steps=1)
    with speed.Profile(config, tmp_path) as profile:
        profile.before(0, None)
        jnp.ones(3).sum().block_until_ready()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_trace_of_negative_steps_is_refused():
    with pytest.raises(ConfigError, match=r"config\.profile\.num_steps = -1"):
        speed.check(tiny.config(profile__num_steps=-1))
