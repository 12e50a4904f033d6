"""Sets that come as arrays, .npz and IDX, against what was written; and their errors."""

import gzip
import io
import struct
import zipfile

import numpy as np
import pytest

from experiments import all as main_job
from experiments.harness.data.sources.source import Options, check_unpacked
from experiments.harness.data.splits import describe, load
from experiments.harness.errors import ConfigError
from tests.experiments import tiny
from tests.experiments.tiny import refused

SPLITS = ("train", "validation", "test")


def random_set(seed: int, n: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 7)
    return rng.integers(0, 256, (n, *shape), np.uint8), labels


def load_both(name, root, split, **options):
    described = describe(name, split, data_dir=str(root), options=Options(**options))
    loaded = load(name, split, data_dir=str(root), options=Options(**options))
    assert loaded.images.shape == (described.num_examples, *described.image_shape)
    assert (loaded.images.dtype, loaded.num_levels) == (np.uint8, 256)
    assert (loaded.labels is None) == (described.num_classes == 0)
    return described, loaded


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(5, 6, 3), (5, 6, 1), (5, 6)])
def test_npz_folder_is_read_as_it_was_written(write, shape, tmp_path):
    sets = {split: random_set(seed, 14, *shape) for seed, split in enumerate(SPLITS)}
    for split, (images, labels) in sets.items():
        write(tmp_path / f"{split}.npz", images=images, labels=labels)
    for split, (images, labels) in sets.items():
        described, loaded = load_both("npz", tmp_path, split)
        np.testing.assert_array_equal(loaded.images, images.reshape(14, 5, 6, -1))
        np.testing.assert_array_equal(loaded.labels, labels)
        assert loaded.labels.dtype == np.int32
        assert described.num_classes == 7


def test_npz_without_labels(tmp_path):
    np.savez(tmp_path / "test.npz", images=random_set(0, 3, 4, 4)[0])
    assert load_both("npz", tmp_path, "test")[0].num_examples == 3


def test_a_label_that_train_does_not_have_is_refused(tmp_path):
    for split, labels in (("train", [0, 1, 2, 1]), ("test", [0, 3, 2, 1])):
        np.savez(tmp_path / f"{split}.npz", images=random_set(0, 4, 2, 2)[0], labels=labels)
    with pytest.raises(
        ConfigError, match=r"test\.npz has the label 3; the labels of train end at 2"
    ):
        describe("npz", "test", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("shape", "labelled", "message"),
    [
        ((8, 8), True, "test has images of shape (8, 8, 1), train (8, 8, 3)"),
        ((4, 4, 3), True, "test has images of shape (4, 4, 3), train (8, 8, 3)"),
        ((8, 8, 3), False, "not every example of npz, test, has a label"),
        ((8, 8, 3), -1, "of npz, test, has a label (the one at 3 has -1)"),
    ],
)
def test_a_split_that_does_not_fit_the_model_is_found_before_training(
    shape, labelled, message, tmp_path
):
    images, labels = random_set(0, 14, 8, 8, 3)
    for split in ("train", "validation"):
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
    arrays = {"images": random_set(1, 14, *shape)[0]}
    if labelled:
        labels[3] = min(labelled, labels[3])
        arrays["labels"] = labels
    np.savez(tmp_path / "test.npz", **arrays)
    config = tiny.config(data__name="npz", data__data_dir=str(tmp_path), train__batch_size=8)
    config.model.class_conditional = True
    with refused(message):
        main_job.check(config)


def test_one_npz_file_is_split_by_seed(tmp_path):
    images, labels = random_set(0, 50, 4, 4, 3)
    np.savez(tmp_path / "all.npz", images=images, labels=labels)
    parts = [load_both("npz", tmp_path / "all.npz", split)[1] for split in SPLITS]
    assert [len(part.images) for part in parts] == [40, 5, 5]
    # Every example once, its label with it.
    found = {
        i.tobytes(): y for part in parts for i, y in zip(part.images, part.labels, strict=True)
    }
    assert found == {i.tobytes(): y for i, y in zip(images, labels, strict=True)}
    other = load_both("npz", tmp_path / "all.npz", "test", split_seed=1)[1]
    assert not np.array_equal(other.images, parts[2].images)


def test_npz_validation_is_cut_out_of_train(tmp_path):
    for split, n in (("train", 20), ("test", 4)):
        np.savez(tmp_path / f"{split}.npz", images=random_set(0, n, 4, 4)[0])
    sizes = [load_both("npz", tmp_path, split)[0].num_examples for split in SPLITS]
    assert sizes == [18, 2, 4]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4), np.float32)}, "type float32 and shape (2, 4, 4)"),
        ({"images": np.zeros((2, 4, 4), np.uint16)}, "type uint16"),
        ({"images": np.zeros(4, np.uint8)}, "shape (4,)"),
        ({"pixels": np.zeros((2, 4, 4), np.uint8)}, "images.npy"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "shape (2,)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)}, "type float64"),
    ],
)
def test_npz_that_cannot_be_used(arrays, message, tmp_path):
    np.savez(tmp_path / "test.npz", **arrays)
    with refused(str(tmp_path / "test.npz"), message):
        describe("npz", "test", data_dir=str(tmp_path))


def images(*shape):
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": images(9, 3, 8, 8)}, "images.transpose(0, 2, 3, 1)"),
        ({"images": images(8, 8, 3, 9)}, "images.transpose(3, 0, 1, 2)"),
        ({"images": images(9, 8, 8, 2)}, "images[..., :1]"),
        ({"images": images(9, 8, 8, 4)}, "images[..., :3]"),
        ({"images": images(9, 8, 8, 5)}, "5 channels, which must be 1 or 3"),
        ({"images": images(9, 0, 8, 3)}, "shape (9, 0, 8, 3)"),
        ({"labels": np.arange(9) % 3 + 1}, "write labels - 1, in all splits"),
        ({"labels": np.full(9, 10**9) * (np.arange(9) > 0)}, "without gaps, by numpy.unique"),
        ({"labels": np.full(9, 10**12)}, "does not fit into 32 bits"),
    ],
)
def test_plausible_but_wrong_arrays_are_refused_with_what_would_fit(arrays, message, tmp_path):
    np.savez(tmp_path / "train.npz", **{"images": images(9, 8, 8, 3)} | arrays)
    with refused(str(tmp_path / "train.npz"), message):
        describe("npz", "train", data_dir=str(tmp_path))


def header_of(shape):
    """An array file of this shape without its content."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


@pytest.mark.parametrize("number", [10**7, 10**15])
def test_an_npz_header_without_its_images_is_refused_by_size(number, tmp_path):
    with zipfile.ZipFile(tmp_path / "train.npz", "w") as archive:
        archive.writestr("images.npy", header_of((number, 8, 8, 3)))
    with pytest.raises(ConfigError, match="bytes where its header says"):
        describe("npz", "train", data_dir=str(tmp_path))


def test_files_that_unpack_to_far_more_than_their_size_are_refused(tmp_path):
    path = tmp_path / "train.npz"
    path.write_bytes(b"0" * 6_000_000)
    check_unpacked(path, 6_000_000, 500_000_000)
    check_unpacked(path, 1_000, 2**20)
    with pytest.raises(ConfigError, match="of 6,000,000 bytes would unpack to 6,000,000,000"):
        check_unpacked(path, 6_000_000, 6_000_000_000)
    with pytest.raises(ConfigError, match="would unpack"):  # the archive lies about its own size
        check_unpacked(path, 10**12, 10**12)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_an_idx_header_without_its_images_is_refused_by_size(ending, tmp_path):
    write_idx(tmp_path / f"train-labels-idx1-ubyte{ending}", np.arange(10))
    path = tmp_path / f"train-images-idx3-ubyte{ending}"
    content = bytes([0, 0, 8, 3]) + struct.pack(">3I", 10**7, 28, 28)
    path.write_bytes(gzip.compress(content) if ending else content)
    with refused(str(path), match=r"bytes where its header says|would unpack"):
        describe("idx", "train", data_dir=str(tmp_path))


@pytest.mark.parametrize("spelt", [("Train", "val", "Test"), ("training", "valid", "testing")])
def test_npz_files_by_other_spellings(spelt, tmp_path):
    for number, name in enumerate(spelt):
        np.savez(tmp_path / f"{name}.npz", images=images(5 + number, 4, 4))
    assert [describe("npz", s, data_dir=str(tmp_path)).num_examples for s in SPLITS] == [5, 6, 7]


def test_damaged_npz(tmp_path):
    path = tmp_path / "test.npz"
    np.savez_compressed(path, images=random_set(0, 50, 8, 8)[0])
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    for content in (whole[:200], b"", bytes(damaged)):
        path.write_bytes(content)
        with refused(f"{path} cannot be read"):
            load("npz", "test", data_dir=str(tmp_path))


def test_missing_npz(tmp_path):
    for data_dir in (str(tmp_path), str(tmp_path / "nowhere"), None):
        with pytest.raises(ConfigError, match=r"train\.npz, validation\.npz, test\.npz"):
            describe("npz", "train", data_dir=data_dir)
    np.savez(tmp_path / "train.npz", images=random_set(0, 5, 4, 4)[0])
    with pytest.raises(ConfigError, match="has only train"):
        describe("npz", "test", data_dir=str(tmp_path))


def write_idx(path, array, kind=8):
    """By MNIST's description of the format: magic number, sizes, then the bytes."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    content = bytes([0, 0, kind, array.ndim]) + sizes + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(params=["{}-idx{}-ubyte", "{}-idx{}-ubyte.gz", "{}.idx{}-ubyte"])
def mnist(request, tmp_path):
    """A set of 36 + 5 images, 6×4; its folder and what is in it."""
    sets = {"train": random_set(0, 36, 6, 4), "t10k": random_set(1, 5, 6, 4)}
    for stem, (images, labels) in sets.items():
        write_idx(tmp_path / request.param.format(f"{stem}-images", 3), images)
        write_idx(tmp_path / request.param.format(f"{stem}-labels", 1), labels)
    return tmp_path, sets


def test_idx_is_read_as_it_was_written(mnist):
    root, sets = mnist
    parts = [load_both("idx", root, split) for split in SPLITS]
    # A twelfth of train is validation: 5,000 of MNIST's 60,000.
    assert [described.num_examples for described, _ in parts] == [33, 3, 5]
    assert {described.num_classes for described, _ in parts} == {7}
    for index, expected in enumerate((sets["train"], sets["t10k"])):
        found = [loaded for _, loaded in (parts[:2], parts[2:])[index]]
        images = np.concatenate([loaded.images for loaded in found])
        np.testing.assert_array_equal(images, expected[0][..., None])
        labels = np.concatenate([loaded.labels for loaded in found])
        np.testing.assert_array_equal(labels, expected[1])
        assert labels.dtype == np.int32


def test_missing_idx_says_what_to_install(tmp_path):
    for data_dir in (str(tmp_path), None):
        with refused(
            f"config.data.data_dir = {data_dir!r}",
            "apt-get install dataset-fashion-mnist",
            match="train-images-idx3-ubyte",
        ):
            describe("idx", "train", data_dir=data_dir)


def test_damaged_idx(tmp_path):
    images, labels = random_set(0, 12, 6, 4)
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels)
    path = tmp_path / "train-images-idx3-ubyte"

    def message():
        with refused(path) as error:
            load("idx", "train", data_dir=str(tmp_path))
        return str(error.value)

    write_idx(path, images)
    path.write_bytes(path.read_bytes()[:-1])
    assert "287 bytes where its header says 288" in message()
    path.write_bytes(b"\0\0")
    assert "no IDX of 3 dimensions" in message()
    write_idx(path, images, kind=13)  # floats
    assert "no IDX of 3 dimensions of unsigned bytes" in message()
    write_idx(path, labels)
    assert "no IDX of 3 dimensions" in message()
    write_idx(path, images[:-1])
    assert "12 labels" in message()
    path.unlink()
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(path, images)
    path.write_bytes(path.read_bytes()[:-40])
    assert "cannot be read" in message()
    path.write_bytes(b"not gzipped")
    assert "cannot be read" in message()


def test_idx_has_no_other_split(mnist):
    with pytest.raises(ConfigError, match="idx has only train, validation, test"):
        describe("idx", "all", data_dir=str(mnist[0]), splits={"all": "train"})
