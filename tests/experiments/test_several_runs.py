"""Several runs in one process share their programs, and leave nothing behind on the devices."""

import gc

import jax
import numpy as np
import pytest

from experiments import all as main_job
from experiments.harness.data import splits
from experiments.harness.processes import shared_programs
from experiments.harness.setup.definition import MODELS, define_model
from experiments.harness.setup.params import init_params
from experiments.notebook import load, measure
from experiments.train import train
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture
def compiled():
    """The names of the programs that were compiled so far."""
    names = []

    def listen(event, seconds, fun_name="", **_):
        names.extend([fun_name] if event.endswith("backend_compile_duration") else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def num_arrays():
    gc.collect()
    return len(jax.live_arrays())


def test_a_run_of_another_seed_compiles_nothing(compiled, tmp_path):
    """With training, two estimates of the bound, samples, a measured Σ_θ, and a notebook call."""
    shared_programs._programs.clear()

    def run(**overrides):
        workdir = tmp_path / str(overrides)
        config = tiny.config(
            train__num_steps=2,
            train__accumulate=2,
            evaluate__also=("continuous",),
            evaluate__max_evaluations=5000,
            analytic__examples=64,
            analytic__levels=4,
            sample__also=("encode",),
            **overrides,
        )
        compiled.clear()
        main_job.run(config, workdir)
        opened = load(workdir)
        opened.bound("test", 10)
        opened.sample(3)
        opened.with_variance("analytic_isotropic")
        return num_arrays(), len(compiled)

    run()
    assert compiled
    first, count = run(seed=1)
    assert count == 0, compiled
    assert run(seed=2) == (first, 0)
    compiled.clear()
    train(tiny.config(train__num_steps=2, train__objective="min_snr"), tmp_path / "other")
    assert compiled


def test_a_measurement_with_another_seed_compiles_nothing(compiled):
    config = tiny.config()
    definition = define_model(config)
    model = definition.model(init_params(definition, 0))
    images = splits.load_data(config, "test", splits.first(12)).images
    x_0 = np.asarray(definition.to_data(images))
    first = measure(model, x_0)
    compiled.clear()
    second = measure(model, x_0, seed=1)
    assert compiled == []
    assert first.bits_per_dim != second.bits_per_dim
    assert measure(model, x_0).bits_per_dim == first.bits_per_dim


def test_a_network_that_is_registered_anew_is_compiled_anew(monkeypatch, tmp_path):
    """Under the same name, with parameters of the same shapes and the same class name."""

    def network(gain):
        class Convolution(tiny.Convolution):
            def __call__(self, x_t, log_snr, condition=None, *, train=False):
                return gain * super().__call__(x_t, log_snr, condition, train=train)

        return lambda config, schedule, out, classes: Convolution(out, classes)

    states = []
    for number, gain in enumerate((1.0, 2.0, 1.0)):
        monkeypatch.setitem(MODELS, "convolution", network(gain))
        states.append(train(tiny.config(train__num_steps=2), tmp_path / str(number)))
    tiny.assert_bit_equal(states[2], states[0])
    kernels = [state.params["network"]["conv"]["kernel"] for state in states]
    assert np.abs(kernels[1] - kernels[0]).min() > 0
