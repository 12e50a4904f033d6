"""Parts of a batch are computed side by side, and joined in their order."""

import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from experiments.harness.processes import cores


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(cores, "num_cores", lambda: 2)
    cores._pool.cache_clear()
    yield
    cores._pool.cache_clear()


def test_calls_run_side_by_side_and_come_back_in_order(two_cores):
    """Each waits until the other has begun."""
    meet = threading.Barrier(2, timeout=60)

    def call(number, name):
        meet.wait()
        return number, name

    assert cores.at_once(call, [0, 1], ["a", "b"]) == [(0, "a"), (1, "b")]
    assert not cores._calls  # which would keep the results in memory


@pytest.mark.parametrize("num_cores", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 16, 31, 32, 33, 48, 128, 447])
def test_parts_are_equal_and_make_up_the_batch(size, num_cores, monkeypatch):
    monkeypatch.setattr(cores, "num_cores", lambda: num_cores)
    parts = [np.arange(size)[part] for part in cores.batch_parts(size)]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(size))
    assert len(parts) <= num_cores
    assert len({len(part) for part in parts}) == 1
    assert len(parts) == 1 or len(parts[0]) >= cores.SMALLEST
    assert size <= cores.padded(size) < size + num_cores
    assert len(cores.batch_parts(cores.padded(size))) == min(num_cores, max(size // 16, 1))


def test_a_batch_in_parts_is_that_batch(two_cores):
    seen = []

    def function(x, labels):
        seen.append(len(x))
        return {"sum": x.sum(axis=1) + labels["a"], "index": labels["a"]}

    x, a = np.arange(64.0).reshape(32, 2), np.arange(32)
    result = cores.in_parts(function, jax.numpy.asarray(x), {"a": a})
    assert seen == [16, 16]
    np.testing.assert_array_equal(result["sum"], x.sum(axis=1) + a)
    np.testing.assert_array_equal(result["index"], a)


def test_settings_of_the_caller_hold_in_its_threads(two_cores):
    def call(_):
        return jax.numpy.ones(2, float).dtype, jax.config.jax_default_matmul_precision

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        assert cores.at_once(call, [0, 1]) == [(np.float64, "highest")] * 2
    assert cores.at_once(call, [0, 1]) == [(np.float32, call(0)[1])] * 2


LONG = """
import sys, threading, time
from experiments.harness.processes import cores, distributed
cores.num_cores = lambda: 2
def call(number):
    if number == 0:
        raise KeyboardInterrupt
    time.sleep(600)
try:
    cores.at_once(call, [0, 1])
except KeyboardInterrupt:
    assert cores.are_at_work()
    sys.exit(distributed.exit_without_waiting(130))
"""


def test_the_program_ends_while_a_core_is_at_work():
    assert subprocess.run([sys.executable, "-c", LONG], timeout=60).returncode == 130


def test_an_error_in_a_part_is_raised(two_cores):
    def function(x):
        raise RuntimeError(f"{len(x)} rows")

    with pytest.raises(RuntimeError, match="16 rows"):
        cores.in_parts(function, np.ones(32))


@pytest.mark.parametrize(("backend", "devices"), [("gpu", 1), ("cpu", 8)])
def test_accelerators_and_several_devices_take_whole_batches(backend, devices, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert cores.batch_parts(128) == [slice(0, 128)]
    main = threading.get_ident()
    assert cores.at_once(lambda _: threading.get_ident(), [0, 1]) == [main, main]
