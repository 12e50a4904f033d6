"""Streamed batches against the set in memory, and the processes that decode them."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from configs import base
from experiments.harness.data.order import batch_indices
from experiments.harness.data.sources.source import Options, Source
from experiments.harness.data.splits import describe, load
from experiments.harness.data.stream import Batches, Stream, is_streamed
from experiments.harness.errors import ConfigError, RunError

ROOT = pathlib.Path(__file__).parents[4]
N, SIZE = 23, 4


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 23 random training images in two classes, and its describing arguments."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(N + 2):
        path = root / ("train" if i < N else "test") / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(path)
    splits = {"train": "train", "validation": "train", "test": "test"}
    return {"data_dir": str(root), "splits": splits, "options": Options(image_size=SIZE)}


def assert_in_order(stream, dataset, seed, batch_size, steps, part=slice(None)):
    """Every batch is that of the set in memory."""
    with stream as batches:
        for step, examples in zip(steps, batches, strict=True):
            index = batch_indices(seed, step, len(dataset.images), batch_size)[part]
            expected = dataset.examples(index)
            np.testing.assert_array_equal(examples.images, expected.images)
            if dataset.labels is None:
                assert examples.labels is None
            else:
                np.testing.assert_array_equal(examples.labels, expected.labels)
                assert examples.labels.dtype == np.int32


@pytest.mark.parametrize(
    ("seed", "first", "last", "batch_size", "workers", "prefetch"),
    [
        *((0, 0, 30, size, 0, 3) for size in (4, 60)),  # a thread; batches larger than the set
        *((3, 10**6, 10**6 + 5, size, 0, 3) for size in (4, 60)),
        # Workers whose number does not divide that of the steps, or exceeds it.
        (0, 0, 13, 6, 1, 1),
        (1, 7, 18, 6, 2, 3),
        (1, 7, 9, 6, 4, 2),
        (5, 10**6, 10**6 + 1, 6, 2, 1),
        (5, 9, 9, 6, 2, 1),  # no steps
    ],
)
def test_batches_follow_the_order_in_memory(
    seed, first, last, batch_size, workers, prefetch, images
):
    source, dataset = describe("folder", "train", **images), load("folder", "train", **images)
    batches = Batches(source, seed, batch_size)
    stream = Stream(batches, first, last, workers=workers, prefetch=prefetch)
    assert_in_order(stream, dataset, seed, batch_size, range(first, last))


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_other_sets_stream_too(name):
    source, dataset = describe(name, "validation"), load(name, "validation")
    assert_in_order(Stream(Batches(source, 0, 50), 3, 12, workers=2), dataset, 0, 50, range(3, 12))


def test_prepared_set_streams_from_workers(tmp_path):
    from tests.mock_cifar10 import write_cifar10

    rng = np.random.default_rng(0)
    examples = rng.integers(0, 256, (20, 32, 32, 3), np.uint8), rng.integers(0, 10, 20)
    write_cifar10(tmp_path, {"train": examples})
    source = describe("cifar10", "train", data_dir=str(tmp_path))
    dataset = load("cifar10", "train", data_dir=str(tmp_path))
    assert_in_order(Stream(Batches(source, 2, 8), 1, 7, workers=2), dataset, 2, 8, range(1, 7))


def test_processes_share_a_batch(images):
    source, dataset = describe("folder", "train", **images), load("folder", "train", **images)
    for part in (slice(0, 3), slice(3, 6)):
        stream = Stream(Batches(source, 0, 6, part), 0, 5, workers=0)
        assert_in_order(stream, dataset, 0, 6, range(5), part)


class Probe:
    """A source whose images tell of the process that decodes them."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    def __call__(self, index: int):
        time.sleep(self.seconds)
        try:
            # JAX refuses this once a backend has started.
            jax.config.update("jax_num_cpu_devices", 1)
            no_backend = True
        except RuntimeError:
            no_backend = False
        facts = (no_backend, "tensorflow" in sys.modules, jax.config.jax_platforms == "cpu")
        process = np.frombuffer(np.uint32(os.getpid()).tobytes(), np.uint8)
        return np.concatenate([process, np.array(facts, np.uint8)]).reshape(1, 7, 1), None

    @staticmethod
    def source(seconds: float = 0.0) -> Source:
        return Source(100, (1, 7, 1), 256, lambda: None, 0, Probe(seconds))


def process_of(image: np.ndarray) -> int:
    return int(np.frombuffer(image.ravel()[:4].tobytes(), np.uint32)[0])


def is_running(process: int) -> bool:
    try:
        status = pathlib.Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(processes: set[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_running, processes))


def test_workers_start_no_backend_and_load_no_tensorflow():
    jax.devices()  # as in training, this process has one
    assert not Probe()(0)[0].ravel()[4]
    with Stream(Batches(Probe.source(), 0, 2), 0, 6, workers=2) as batches:
        seen = np.concatenate([examples.images.reshape(-1, 7) for examples in batches])
    processes = {process_of(row) for row in seen}
    assert len(processes) == 2
    assert os.getpid() not in processes
    np.testing.assert_array_equal(seen[:, 4:], np.tile([True, False, True], (12, 1)))


def test_leaving_ends_the_workers_at_once():
    with Stream(Batches(Probe.source(), 0, 2), 0, 10**6, workers=2, prefetch=4) as batches:
        processes = {process_of(next(batches).images[0]) for _ in range(4)}
        assert all(map(is_running, processes))
        began = time.monotonic()
    assert not any(map(is_running, processes))
    assert time.monotonic() - began < 10


def test_a_killed_consumer_leaves_no_workers():
    script = (
        "import os, sys, time\n"
        "from tests.experiments.harness.data.test_stream import Probe, process_of\n"
        "from experiments.harness.data.stream import Batches, Stream\n"
        "if __name__ == '__main__':\n"
        "    with Stream(Batches(Probe.source(), 0, 2), 0, 10**6, workers=2) as batches:\n"
        "        print(*{process_of(next(batches).images[0]) for _ in range(4)}, flush=True)\n"
        "        time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    consumer = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        workers = {int(word) for word in consumer.stdout.readline().split()}
        assert len(workers) == 2
        assert all(map(is_running, workers))
        # The signals that a terminal or a scheduler sends to all of a run are the consumer's.
        for worker in workers:
            os.kill(worker, signal.SIGINT)
            os.kill(worker, signal.SIGTERM)
        time.sleep(0.5)
        assert all(map(is_running, workers))
    finally:
        consumer.kill()
        consumer.wait()
        consumer.stdout.close()
    assert wait_until_gone(workers, 20)


def test_a_killed_worker_stops_the_run():
    with Stream(Batches(Probe.source(), 0, 2), 0, 10**6, workers=1) as batches:
        os.kill(process_of(next(batches).images[0]), signal.SIGKILL)
        with pytest.raises(RunError, match="process that decodes data has died"):
            for _ in batches:
                pass


@pytest.mark.parametrize(
    ("code", "reason"),
    [(1, 'if __name__ == "__main__": since'), (-9, "perhaps for lack of memory")],
)
def test_why_a_worker_died_is_told_by_its_exit_code(code, reason):
    def die():
        raise RuntimeError(f"Worker process was terminated unexpectedly with exit code {code}.")
        yield

    stream = Stream(Batches(Probe.source(), 0, 2), 0, 10, workers=1)
    stream._iterator = die()
    with pytest.raises(RunError, match="process that decodes data has died") as error:
        next(stream)
    assert reason in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_in_its_turn(workers, images, tmp_path):
    for i in range(8):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    options = Options(image_size=4, held_out=0.125)
    source = describe("folder", "train", data_dir=str(tmp_path), options=options)
    order = batch_indices(0, 0, 6, 6)
    bad = source.get.root / source.get.names[order[3]]
    bad.write_bytes(bad.read_bytes()[:40])
    with Stream(Batches(source, 0, 1), 0, 6, workers=workers, prefetch=4) as batches:
        for _ in range(3):
            next(batches)
        with pytest.raises(ConfigError, match="skip_corrupt") as error:
            next(batches)
    assert str(error.value).startswith(f"{bad} cannot be read")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stream", "limit", "expected"),
    [
        ("auto", 1, True),  # 1,000 crops are 3 MB
        ("auto", 3, False),
        ("never", 1, False),
        ("always", 1000, True),
    ],
)
def test_large_sets_are_streamed(stream, limit, expected):
    settings = base.get_config().data
    settings.update(stream=stream, memory_limit_mb=limit)
    assert is_streamed(settings, describe("photos", "validation")) == expected
