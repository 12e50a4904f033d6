"""One run on one device and on many, in one process and in two; memory spared in every way."""

import functools
import json
import re
import socket
import subprocess
import sys
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import memory
from experiments import all as main_job
from experiments.harness import devices, seeds
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError
from experiments.harness.processes import distributed
from experiments.harness.setup.definition import MODELS, define_model
from experiments.harness.training import gradients
from experiments.harness.training.loss import Batch, Inputs
from experiments.harness.training.state import first_state, make_setup
from experiments.train import check as check_training
from models import layers
from tests.experiments import processes, tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def start(environment, num_devices, *arguments):
    """The program of `processes` on so many devices of a CPU."""
    flags = (
        f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices} "
        # More threads than cores: one may be late.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    )
    return subprocess.Popen(
        [sys.executable, "-m", "tests.experiments.processes", *map(str, arguments)],
        env=environment | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*running):
    for process, (output, _) in [(process, process.communicate()) for process in running]:
        assert process.returncode == 0, output


def free_address():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"localhost:{found.getsockname()[1]}"


def assert_same_run(numbers, case, one):
    np.testing.assert_array_equal(numbers[f"{case}/images"], one["one/images"])
    np.testing.assert_allclose(numbers[f"{case}/losses"], one["one/losses"], rtol=1e-9)
    names = [name.removeprefix("one/") for name in one if name.startswith("one/gradient")]
    assert len(names) == 6
    for name in names:
        expected = one[f"one/{name}"]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            numbers[f"{case}/{name}"], expected, rtol=0, atol=1e-5 * scale, err_msg=name
        )


def test_eight_devices_and_two_processes_do_what_one_device_does(tmp_path, quick_compiles):
    """The batches exactly, the first gradient to 1e-5 in float32, 50 losses to 1e-9 in float64.

    With parameters whole or split, and with batches held on the devices or brought to them.
    """
    cases, two = "held_1,held_4,streamed_8", "held_1,streamed_8"
    finish(start(quick_compiles, 8, tmp_path / "eight.npz", cases))
    address = free_address()
    finish(*[start(quick_compiles, 4, tmp_path / "two.npz", two, address, 2, i) for i in range(2)])
    with np.load(tmp_path / "eight.npz") as eight, np.load(tmp_path / "two.npz") as both:
        assert np.ptp(eight["one/losses"]) > 1  # it is a curve
        for case in cases.split(","):
            assert_same_run(eight, case, eight)
        for case in two.split(","):
            assert_same_run(both, case, eight)


def test_a_run_goes_on_from_eight_devices_to_one_and_back(tmp_path, quick_compiles):
    """Parameters split over four of eight; what one device restores is what eight had, exactly."""
    finish(start(quick_compiles, 8, "resume", tmp_path / "run", 4, 3))
    processes.resume(tmp_path / "run", 1, 3)
    finish(start(quick_compiles, 8, "resume", tmp_path / "run", 4, 3))
    found = processes.resume(tmp_path / "run", 1, 0)
    alone = processes.resume(tmp_path / "alone", 1, 9)
    assert int(found.step) == int(alone.step) == 9
    for part in ("params", "ema_params", "opt_state"):
        for a, b in zip(*[jax.tree.leaves(getattr(s, part)) for s in (found, alone)], strict=True):
            scale = np.abs(b).max()
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * scale)


def test_two_processes_run_the_job_stop_and_go_on_as_one(tmp_path, quick_compiles):
    """A signal to one of them stops both, and so does what only one cannot read.

    Every file is written once, and all is as one process does it.
    """

    def both(what):
        address = free_address()
        running = [
            start(quick_compiles, 2, "job", tmp_path / "two", what, address, 2, i) for i in range(2)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in running]
        return outputs, [process.returncode for process in running]

    outputs, statuses = both("fail")
    assert statuses[0] == 2
    assert statuses[1] != 0
    assert "error: a.png cannot be read" in outputs[0]
    outputs, statuses = both("stop")
    assert statuses == [143, 143], outputs
    assert all("is saved in" in output for output in outputs)
    assert (tmp_path / "two" / "interrupted").exists()
    outputs, statuses = both("go on")
    assert statuses == [0, 0], outputs
    assert ["test bits/dim" in output for output in outputs] == [True, False]
    alone = processes.job_config()
    alone.devices.fsdp = 1
    main_job.run(alone, tmp_path / "one")
    two, one = (tiny.metrics(tmp_path / name) for name in ("two", "one"))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for a, b in zip(two, one, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    results = [json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("two", "one")]
    assert results[0]["bits_per_dim"] == pytest.approx(results[1]["bits_per_dim"], rel=1e-5)
    for file, names in (
        ("evaluation.npz", ("kl", "x_0_rmse", "bits_per_dim_per_example")),
        ("samples/samples.npz", ("x_0",)),
    ):
        with np.load(tmp_path / "two" / file) as a, np.load(tmp_path / "one" / file) as b:
            for name in names:
                scale = np.abs(b[name]).max()
                np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-3 * scale)
    names = [
        {p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*.*") if "tfev" not in p.name}
        for n in ("two", "one")
    ]
    assert {p for p in names[0] ^ names[1] if p.parts[0] != "checkpoints"} == set()


def test_parameters_are_split_by_their_largest_axis_that_can_be():
    mesh = jax.sharding.AbstractMesh((2, 4), devices.AXES)
    shapes = {
        "largest": (3, 3, 64, 128),
        "outputs": (64, 64),
        "divisible": (30, 1001, 8),
        "odd": (33, 35),
        "small": (256,),
    }
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    split = {
        name: dict(enumerate(of.spec)) for name, of in devices.shard_params(mesh, tree).items()
    }
    assert {name: [k for k, v in spec.items() if v] for name, spec in split.items()} == {
        "largest": [3],
        "outputs": [1],
        "divisible": [2],
        "odd": [],
        "small": [],
    }
    whole = jax.sharding.AbstractMesh((8, 1), devices.AXES)
    for sharding in jax.tree.leaves(devices.shard_params(whole, tree)):
        assert sharding.is_fully_replicated


def test_processes_that_are_told_too_little_say_so():
    distributed.initialize()
    for told, expected in (
        ({"coordinator": "localhost:1"}, "--num_processes, --process_id missing"),
        ({"process_id": 0, "automatic": True}, "--distributed finds"),
        (
            {"coordinator": "localhost:1", "num_processes": 2, "process_id": 2},
            r"--process_id=2; it must be in 0 … 1",
        ),
    ):
        with pytest.raises(ConfigError, match=expected):
            distributed.initialize(**told)


def test_a_port_that_another_program_uses_is_refused():
    with socket.create_server(("", 0)) as other:
        address = f"localhost:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"coordinator={address} cannot be used .*in use"):
            distributed.initialize(address, 2, 0)


def test_a_process_that_nobody_joins_ends_with_one_line(monkeypatch, capsys):
    ended = threading.Event()
    statuses = []

    def leave(status):
        statuses.append(status)
        ended.set()

    monkeypatch.setattr(distributed, "_PATIENCE", 0.1)
    monkeypatch.setattr(distributed.os, "_exit", leave)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: ended.wait(60))
    distributed.initialize(free_address(), 2, 0)
    assert statuses == [2]
    line = capsys.readouterr().err
    assert line.startswith("error: --coordinator=localhost:")
    assert "not all processes came within 0 s" in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"train__accumulate": 3}, "does not split over 1 devices in 3 parts; use a multiple of 3"),
        (
            {"train__steps_per_dispatch": 2, "train__log_every": 2},
            "steps_per_dispatch = 2 is for accelerators",
        ),
        ({"devices__fsdp": 3}, "devices.fsdp = 3; it must divide the number of devices, 1"),
        ({"model__remat": True}, "model.name = 'dense' has no config.model.dtype or remat"),
    ],
)
def test_settings_that_do_not_fit_are_named(overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        check_training(processes.config(**overrides))


def assert_close(actual, expected, tolerance):
    """To within so much of an array's largest element, or a thousandth of the largest of all.

    Attention does not change with its keys' bias, whose gradient is zero but for rounding.
    """
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, (path, e) in zip(
        jax.tree.leaves(actual), jax.tree_util.tree_flatten_with_path(expected)[0], strict=True
    ):
        scale = max(np.abs(e).max(), 1e-3 * largest)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * scale, err_msg=str(path))


@pytest.mark.parametrize("timesteps", ["stratified", "importance"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(timesteps, monkeypatch):
    """With its flips, noise and times; to rounding, of sums in another order. Without dropout."""
    without_dropout = functools.partial(tiny.Convolution, dropout=0.0)
    build = lambda config, schedule, out, classes: without_dropout(out, classes)  # noqa: E731
    monkeypatch.setitem(MODELS, "convolution", build)
    overrides = {"data__flip": True, "train__timesteps": timesteps}
    found = []
    for parts in (1, 4):
        config = tiny.config(train__accumulate=parts, **overrides)
        setup = make_setup(config)
        state = first_state(setup)
        examples = splits.load_data(config, "train").examples(slice(None))
        compute, root = jax.jit(gradients.make_gradients(setup)), seeds.root(config.seed)
        found.append(jax.device_get(compute(root, state, examples, np.arange(16))))
    (batch, whole), (batch_in_parts, in_parts) = found
    np.testing.assert_array_equal(batch_in_parts.t, batch.t)
    np.testing.assert_array_equal(batch_in_parts.time, batch.time)
    np.testing.assert_allclose(batch_in_parts.losses, batch.losses, rtol=1e-5)
    assert_close(in_parts, whole, 2e-6)


def test_each_part_of_a_batch_has_its_own_dropout_key():
    def loss(params, inputs, dropout_key, history):
        draws = jax.random.uniform(dropout_key, (len(inputs.x_0),))
        return params * draws.sum(), Batch(draws, draws, inputs.time, history)

    inputs = Inputs(jnp.ones((4, 8, 8, 1)), jnp.ones((4, 8, 8, 1)), jnp.ones(4), None)
    gradient = gradients.accumulate_gradients(loss, 2, devices.mesh())
    batch, _ = gradient(1.0, (inputs, jax.random.key(0)), jnp.zeros(2, int))
    assert len(np.unique(batch.losses)) == 4


def test_several_steps_at_once_are_those_steps():
    one_by_one = processes.Training(processes.config(), devices.mesh())
    at_once = processes.Training(processes.config(train__steps_per_dispatch=3), devices.mesh())
    streamed = processes.Training(at_once.config, devices.mesh(), streamed=True)
    for _ in range(6):
        one_by_one.step()
    for training in (at_once, streamed):
        for _ in range(2):
            training.step()
        tiny.assert_bit_equal(training.state, one_by_one.state)


def unet_gradients(**overrides):
    """Of a U-Net whose last layers are not zero, so that every parameter has some."""
    config = tiny.config("unet", **overrides)
    training = processes.Training(config, devices.mesh())
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: np.float32(a + 0.05 * rng.standard_normal(a.shape)), training.state.params
    )
    training.state = training.state._replace(params=params)
    return training.gradients()


@pytest.fixture(scope="module")
def full(quick_compiles):
    return unet_gradients()


def test_blocks_computed_again_have_the_same_gradients(full):
    """With the same parameters by name, and the same dropout."""
    again = unet_gradients(model__remat=True)
    assert jax.tree.structure(again) == jax.tree.structure(full)
    assert_close(again, full, 1e-5)


def test_blocks_computed_again_keep_less_for_the_gradient():
    """Their inputs, which for blocks of this kind are a small part of what they compute."""
    sizes = {"model__unet__num_res_blocks": 3}
    stored, again = (
        memory.bytes_for_gradient(tiny.config("unet", model__remat=remat, **sizes))
        for remat in (False, True)
    )
    assert again < 0.25 * stored
    half = memory.bytes_for_gradient(tiny.config("unet", model__dtype="bfloat16", **sizes))
    assert 0.4 * stored < half < 0.9 * stored


def test_bfloat16_trains_float32_parameters_to_its_own_precision(full):
    """bfloat16 has 8 bits: a product is off by 2⁻⁸, and a gradient's direction by about as much."""
    half = unet_gradients(model__dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(np.float32)}
    flat, expected = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (half, full)
    )
    error = np.linalg.norm(flat - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05


def test_norms_softmax_and_output_stay_in_float32_under_bfloat16():
    config = tiny.config("unet", model__dtype="bfloat16")
    network = gradients.trained_network(config, define_model(config).network)
    x_t, log_snr = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2)
    variables = jax.eval_shape(network.init, jax.random.key(0), x_t, log_snr)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(network.apply, variables, x_t, log_snr).dtype == jnp.float32
    program = jax.jit(network.apply).lower(variables, x_t, log_snr).as_text()

    def computed_in(operation, shape=""):
        lines = re.findall(rf"stablehlo\.{operation}\b.*tensor<{shape}[\dx]*x(\w+)>\n", program)
        return set(lines)

    assert computed_in("rsqrt") == {"f32"}  # group norms
    assert computed_in("exponential", "2x1x16x16") == {
        "f32"
    }  # softmax of one head over 4 × 4 pixels
    assert computed_in("convolution") == {"bf16", "f32"}  # all but the last
    large = 1000 + jax.random.normal(jax.random.key(1), (1, 8, 8, 4), jnp.bfloat16)
    norm = layers.GroupNorm(2)
    made = norm.apply(norm.init(jax.random.key(0), large), large)
    exact = nn.GroupNorm(2, use_fast_variance=False)
    expected = exact.apply(exact.init(jax.random.key(0), large), large.astype(jnp.float32))
    assert made.dtype == jnp.bfloat16
    np.testing.assert_allclose(made.astype(jnp.float32), expected, rtol=2**-8, atol=1e-3)
