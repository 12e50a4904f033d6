"""Data sets against their sources, and the laws of the order in which they are visited."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_digits

from experiments.harness.data.order import _epoch_order, batch_indices, padded_batches
from experiments.harness.data.sources import source
from experiments.harness.data.sources.images import decode
from experiments.harness.data.splits import describe, load
from experiments.harness.errors import ConfigError
from tests.experiments.tiny import refused
from tests.mock_cifar10 import write_cifar10

ROOT = pathlib.Path(__file__).parents[4]
CIFAR10_SPLITS = {"train": "train[:45000]", "validation": "train[45000:]", "test": "test"}


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """A prepared cifar10 of 20 + 5 random images: its data_dir, and what was put in."""
    rng = np.random.default_rng(0)
    examples = {
        split: (rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n))
        for split, n in (("train", 20), ("test", 5))
    }
    data_dir = tmp_path_factory.mktemp("tensorflow_datasets")
    write_cifar10(data_dir, examples)
    return str(data_dir), examples


def test_digits_splits_are_the_shipped_set_in_order():
    shipped = load_digits()
    splits = [load("digits", split) for split in ("train", "validation", "test")]
    assert [len(d.images) for d in splits] == [1000, 350, 447]
    images = np.concatenate([d.images for d in splits])
    assert {d.num_levels for d in splits} == {17}
    assert set(np.unique(splits[0].images)) == set(range(17))
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images[..., 0], shipped.images)
    labels = np.concatenate([d.labels for d in splits])
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, shipped.target)


def test_prepared_set_is_read_as_it_was_written(cifar10):
    data_dir, examples = cifar10
    for split, (images, labels) in examples.items():
        described = describe("cifar10", split, data_dir=data_dir)
        assert (described.num_examples, *described.image_shape) == images.shape
        loaded = load("cifar10", split, data_dir=data_dir)
        assert (loaded.name, loaded.split) == ("cifar10", split)
        np.testing.assert_array_equal(loaded.images, images)
        np.testing.assert_array_equal(loaded.labels, labels)
        assert (loaded.images.dtype, loaded.labels.dtype) == (np.uint8, np.int32)
        assert loaded.num_levels == described.num_levels == 256


@pytest.mark.parametrize("size", [16, 40])
def test_prepared_set_is_resized_as_files_are(size, cifar10, tmp_path):
    data_dir, examples = cifar10
    found = load("cifar10", "test", data_dir=data_dir, options=source.Options(image_size=size))
    path = tmp_path / "image.png"
    for image, resized in zip(examples["test"][0], found.images, strict=True):
        Image.fromarray(image).save(path)
        np.testing.assert_array_equal(resized, decode(path, size, 3))


def test_images_of_varying_size_are_given_one(monkeypatch):
    shapes = [(30, 40, 3), (50, 20, 3)]
    fake_examples(
        monkeypatch, "cifar10", [{"image": np.full(s, 7, np.uint8), "label": 1} for s in shapes]
    )
    with pytest.raises(ConfigError, match=r"images of varying size.*image_size gives them one"):
        load("cifar10", "train")
    assert load("cifar10", "train", options=source.Options(image_size=8)).images.shape == (
        2,
        8,
        8,
        3,
    )


def test_split_expressions_cut_the_set(cifar10):
    data_dir, examples = cifar10
    splits = ConfigDict({"train": "train[:15]", "validation": "train[15:]", "test": "test"})
    parts = [load("cifar10", s, data_dir=data_dir, splits=splits) for s in ("train", "validation")]
    assert [len(part.images) for part in parts] == [15, 5]
    np.testing.assert_array_equal(
        np.concatenate([part.images for part in parts]), examples["train"][0]
    )


def test_default_directory_is_tensorflow_datasets_own(cifar10, monkeypatch):
    data_dir, examples = cifar10
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", data_dir)
    np.testing.assert_array_equal(load("cifar10", "test", data_dir="").labels, examples["test"][1])


def test_tensorflow_is_never_imported(cifar10, tmp_path):
    # Whether or not it is installed: here it is, and raises what nothing catches by accident.
    trap = tmp_path / "tensorflow"
    trap.mkdir()
    (trap / "__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
    script = (
        "import sys; from experiments.harness.data import splits\n"
        "from tests.mock_cifar10 import mock_tfds\n"
        "assert not {'sklearn', 'tensorflow_datasets'} & set(sys.modules), 'heavy imports'\n"
        f"splits.load('cifar10', 'train', data_dir={cifar10[0]!r})\n"
        "with mock_tfds(3): splits.load('cifar10', 'train')\n"
        "assert 'tensorflow' not in sys.modules"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def fake_examples(monkeypatch, name, examples):
    """Lets tensorflow-datasets find these examples, whatever the set's features say."""
    builder = type(tfds.builder(name))
    monkeypatch.setattr(builder, "as_data_source", lambda self, split: examples)


def test_grey_images_get_a_channel_axis(monkeypatch):
    images = np.arange(2 * 28 * 28).reshape(2, 28, 28).astype(np.uint8)
    fake_examples(monkeypatch, "mnist", [{"image": image, "label": 7} for image in images])
    loaded = load("mnist", "train")
    np.testing.assert_array_equal(loaded.images, images[..., None])
    np.testing.assert_array_equal(loaded.labels, [7, 7])


def test_set_without_labels(monkeypatch):
    image = np.zeros((64, 64, 3), np.uint8)
    fake_examples(monkeypatch, "downsampled_imagenet/64x64", [{"image": image}] * 3)
    loaded = load("downsampled_imagenet/64x64", "train")
    assert loaded.labels is None
    assert loaded.examples(np.array([1, 1])).labels is None
    assert describe("downsampled_imagenet/64x64", "train").num_classes == 0


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("digit", "did you mean digits"),
        ("cifra10", "did you mean cifar10"),
        ("zzzz", "known: digits"),
        ("", "known: digits"),
        ("no such set!", "known: digits"),
        ("downsampled_imagenet/31x31", "known: downsampled_imagenet/32x32"),
        ("cifar10:1.2.3", "known: cifar10:3"),
    ],
)
def test_unknown_set_says_what_is_known(name, hint):
    with refused(f"config.data.name = {name!r}", hint):
        describe(name, "train")


def test_unknown_split_says_what_is_known():
    for name in ("digits", "cifar10"):
        with pytest.raises(ConfigError, match="'tset' is unknown; known: train, validation, test"):
            describe(name, "tset")
    with pytest.raises(ConfigError, match="digits has only train, validation, test"):
        describe("digits", "all", splits={"all": "train+test"})


def test_missing_set_says_where_it_was_sought_and_what_to_run(tmp_path):
    with refused(f"{tmp_path}/cifar10/") as error:
        describe("cifar10", "train", data_dir=str(tmp_path))
    message = str(error.value)
    # The command must be Python, and prepare this set, there, in a format that can be read.
    command = message[message.index('python -c "') :].split('"')[1]
    prepared = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tfds.core.DatasetBuilder,
            "download_and_prepare",
            lambda self, file_format: prepared.append((self.name, self.data_path, file_format)),
        )
        exec(compile(command, "command", "exec"), {})
    [(name, path, file_format)] = prepared
    assert (name, file_format) == ("cifar10", "array_record")
    assert path.is_relative_to(tmp_path)
    assert not any(tmp_path.iterdir())


def test_set_in_another_format(tmp_path):
    examples = np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2)
    info = write_cifar10(tmp_path, {"train": examples}) / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with refused("file_format='array_record'", match="only tfrecord ones: delete them first"):
        describe("cifar10", "train", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    "expression", ["validation", "train[:0]", "train[20:]", "train[:45000]", "train[nonsense", ""]
)
def test_split_expression_that_selects_nothing(expression, cifar10):
    splits = {"validation": expression}
    with refused(f"config.data.splits.validation = {expression!r}", "train (20), test (5)"):
        describe("cifar10", "validation", data_dir=cifar10[0], splits=splits)


def test_damaged_copy(tmp_path):
    examples = np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2)
    [records] = write_cifar10(tmp_path, {"train": examples}).glob("*array_record*")
    for damage in (lambda: records.write_bytes(b"not records"), records.unlink):
        damage()
        with pytest.raises(ConfigError, match="missing or damaged"):
            load("cifar10", "train", data_dir=str(tmp_path))


def test_set_without_images():
    with pytest.raises(ConfigError, match="'imdb_reviews' has no feature called image"):
        describe("imdb_reviews", "train")


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((28, 28, 1), np.uint16),
        np.zeros((28, 28, 1), np.float32),
        np.zeros((2, 28, 28, 1), np.uint8),
        np.zeros(28, np.uint8),
    ],
)
def test_images_that_cannot_be_used(image, monkeypatch):
    fake_examples(monkeypatch, "mnist", [{"image": image, "label": 0}])
    with refused(f"type {image.dtype} and shape {image.shape}"):
        describe("mnist", "train")


@pytest.mark.parametrize(("n", "b"), [(12, 4), (13, 4), (7, 7), (5, 12), (1, 3), (100, 1)])
def test_every_epoch_visits_every_example_once(n, b):
    num_epochs = 6
    steps = -(-num_epochs * n // b)
    visits = np.concatenate([batch_indices(3, step, n, b) for step in range(steps)])
    epochs = visits[: num_epochs * n].reshape(num_epochs, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (num_epochs, 1)))


def test_order_is_one_sequence_however_it_is_cut_into_batches():
    whole = batch_indices(0, 0, 10, 60)
    for b in (1, 4, 10, 15, 20):
        cut = np.concatenate([batch_indices(0, step, 10, b) for step in range(60 // b)])
        np.testing.assert_array_equal(cut, whole)


def test_order_depends_on_seed_and_step_alone():
    expected = {step: batch_indices(5, step, 20, 8) for step in range(12)}
    for step in np.random.default_rng(0).permutation(12).tolist():
        _epoch_order.cache_clear()
        batch_indices(6, 3, 50, 8)  # another run in the same process
        np.random.seed(step)  # noqa: NPY002 — global state must not matter
        np.testing.assert_array_equal(batch_indices(5, step, 20, 8), expected[step])


def test_epochs_and_seeds_differ():
    orders = [tuple(batch_indices(seed, step, 50, 50)) for seed in (0, 1, -1) for step in range(4)]
    assert len(set(orders)) == len(orders)


def test_order_is_uniform_over_permutations():
    counts = {}
    for epoch in range(2400):
        order = tuple(batch_indices(0, epoch, 4, 4))
        counts[order] = counts.get(order, 0) + 1
    # χ² with 23 degrees of freedom, mean 23 and standard deviation √46: within 4 of these.
    chi2 = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert len(counts) == 24
    assert chi2 < 23 + 4 * 46**0.5


def test_order_is_for_good():
    # Runs are resumed on other machines and under other versions of numpy. These are the examples
    # in the order of Philox 4x64's first eight words, for the keys (0, 0) and (1, 3).
    assert batch_indices(0, 0, 8, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert batch_indices(1, 3, 8, 8).tolist() == [3, 2, 5, 4, 6, 1, 0, 7]


def test_late_steps_do_not_overflow():
    indices = batch_indices(0, 10**9, 1_000, 4096)
    assert indices.dtype == np.int32
    assert indices.min() == 0
    assert indices.max() == 999


def test_writing_to_a_batch_leaves_the_order_alone():
    first = batch_indices(0, 0, 8, 8)
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(batch_indices(0, 0, 8, 8), kept)


@pytest.mark.parametrize(("n", "b"), [(3, 8), (8, 8), (16, 8), (17, 8), (23, 8), (1, 1), (1, 4)])
def test_padded_batches_cover_every_example_once_in_order(n, b):
    batches = list(padded_batches(n, b))
    assert len(batches) == -(-n // b)
    for indices, mask in batches:
        assert indices.shape == mask.shape == (b,)
        assert (indices.dtype, mask.dtype) == (np.int32, np.bool_)
        assert indices.max() < n
        assert mask.any()
    seen = np.concatenate([indices[mask] for indices, mask in batches])
    np.testing.assert_array_equal(seen, np.arange(n))
