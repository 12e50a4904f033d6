"""The speed of a run, and the trace of its steps."""

import jax
import jax.numpy as jnp
import pytest

from experiments.harness.training import speed
from models.convolutions import trained_3x3
from tests.experiments import tiny


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


@pytest.mark.parametrize("repeats", [1, 3])
def test_operations_of_a_product_and_a_convolution_repeated(repeats):
    """Two for each term of a sum: k terms in a product, the taps times the channels in a
    convolution. A gradient with respect to both factors takes twice as many again."""
    m, k, n = 48, 40, 56
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    left, right = jnp.ones((m, k)), jnp.ones((k, n))

    def conv(image, kernel, stride=1):
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, kernel, (stride, stride), "SAME", dimension_numbers=axes
        )

    def step(carry, _):
        return carry + (left @ right).sum() + conv(image, kernel, stride=2).sum(), None

    def flops(function, *args):
        return speed.count_flops(jax.jit(function).trace(*args).jaxpr)

    product, convolution = 2 * m * k * n, 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    repeated = flops(lambda: jax.lax.scan(step, 0.0, length=repeats))
    assert repeated == repeats * (product + convolution)
    gradient = jax.grad(lambda *args: jnp.square(conv(*args)).sum(), argnums=(0, 1))
    assert flops(gradient, image, kernel) == 3 * 4 * convolution


def test_a_convolution_of_several_forms_counts_as_the_direct_one():
    x, kernel = jnp.zeros((8, 16, 16, 64)), jnp.zeros((3, 3, 64, 64))
    gradient = jax.grad(lambda x, kernel: trained_3x3(x, kernel).sum(), argnums=(0, 1))
    jaxpr = jax.jit(gradient).trace(x, kernel).jaxpr
    # The value, and the gradients with respect to x and to the kernel.
    assert speed.count_flops(jaxpr) == 3 * 2 * 9 * 64**2 * 8 * 16**2


def test_the_speed_between_two_timings():
    """Ten steps of 32 images in five seconds, one spent waiting, on a device half in use."""
    last = speed.Timing(steps=7, seconds=2.0, waited=0.5, flops=1e6)
    timing = speed.Timing(steps=17, seconds=7.0, waited=1.5, flops=1e6)
    values = speed.speed_values(timing, last, 32, peak=4e6)
    values.pop("peak_memory_bytes", None)  # known on some devices
    assert values == {
        "images_per_second": 64.0,
        "step_seconds": 0.5,
        "data_wait": 0.2,
        "flops_per_second": 2e6,
        "flop_utilization": 0.5,
    }
    assert "flop_utilization" not in speed.speed_values(timing, last, 32, peak=None)
    unknown = timing._replace(flops=None)
    assert "flops_per_second" not in speed.speed_values(unknown, last, 32, peak=4e6)
    assert speed.speed_values(timing, timing, 32, peak=4e6) == {}


@pytest.mark.parametrize(("first", "expected"), [(1, [1, 2]), (4, [4])])
def test_a_trace_has_the_chosen_steps(first, expected, tmp_path, monkeypatch):
    """Also if the run ends before the last of them."""
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


def test_a_trace_starts_at_the_first_call_after_the_chosen_step(tmp_path, monkeypatch):
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


def test_a_run_that_ends_before_its_trace_prints_a_line(tmp_path, capsys):
    config = tiny.config(profile__first_step=9, profile__num_steps=1)
    with speed.Profile(config, tmp_path) as profile:
        profile.before(0, jnp.zeros(()))
    assert "config.profile.first_step = 9" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()


def test_a_trace_is_written(tmp_path):
    config = tiny.config(profile__first_step=0, profile__num_steps=1)
    with speed.Profile(config, tmp_path) as profile:
        profile.before(0, None)
        jnp.ones(3).sum().block_until_ready()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
