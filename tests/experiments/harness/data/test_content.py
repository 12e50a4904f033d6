"""Fingerprints of a data set's files, and what they decide."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from experiments.harness.data import splits
from experiments.harness.data.sources import content
from experiments.harness.errors import ConfigError
from experiments.harness.setup import trained
from experiments.harness.workdir import dependences, files, provenance, record
from tests.experiments import tiny
from tests.mock_cifar10 import mock_tfds, write_cifar10


def write(path, seed, size=1000):
    path.write_bytes(np.random.default_rng(seed).bytes(size))


@pytest.mark.parametrize("whole", [content.WHOLE, 1000])
def test_names_sizes_and_content_count_and_times_do_not(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(content, "WHOLE", whole)
    monkeypatch.setattr(content, "_BLOCK", 100)
    folders = {name: tmp_path / name for name in ("same", "bytes", "size", "name")}
    for folder in folders.values():
        folder.mkdir()
        for name in "abc":
            write(folder / name, ord(name))
    reference = content.fingerprint(folders["same"], "abc")
    os.utime(folders["same"] / "a", (1, 1))
    assert content.fingerprint(folders["same"], "abc") == reference
    for name in "abc":
        write(folders["bytes"] / name, 1)
    write(folders["size"] / "a", ord("a"), 999)
    (folders["name"] / "c").rename(folders["name"] / "d")
    others = {content.fingerprint(folders[name], "abc") for name in ("bytes", "size")}
    others.add(content.fingerprint(folders["name"], "abd"))
    assert len(others | {reference}) == 4
    write(folders["same"] / "b", 2)  # in place, in the same process
    assert content.fingerprint(folders["same"], "abc") != reference
    with pytest.raises(ConfigError, match="d cannot be read"):
        content.fingerprint(folders["same"], "abd")


def write_npz(root, seed):
    rng = np.random.default_rng(seed)
    np.savez(root, images=rng.integers(0, 256, (12, 4, 4), np.uint8), labels=np.arange(12) % 3)


def write_folder(root, seed):
    for name in "abcdefghijkl":
        pixels = np.random.default_rng([seed, ord(name)]).integers(0, 256, (4, 4, 3), np.uint8)
        root.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / f"{name}.bmp")  # all of one size


@pytest.mark.parametrize(("name", "write"), [("npz", write_npz), ("folder", write_folder)])
def test_a_replaced_split_is_noticed_and_a_copy_is_not(name, write, tmp_path, monkeypatch):
    ending = ".npz" if name == "npz" else ""
    root = tmp_path / "data"
    root.mkdir()
    for seed, split in enumerate(("train", "validation", "test")):
        write(root / f"{split}{ending}", seed)

    def config_of(place):
        return tiny.config(data__name=name, data__data_dir=str(place), data__image_size=4)

    def evaluation(place):
        data = splits.fingerprints(config_of(place))
        return provenance.identity(dependences.EVALUATION, config_of(place), 3, data=data)

    def check_resumption(place):
        source = splits.describe_data(config_of(place), "train")
        data = record.DataSummary(*source.summary())
        record.check_data(config_of(place), tmp_path, data)
        record.record_data(tmp_path, data)

    monkeypatch.setattr(record, "is_new", lambda workdir: False)
    check_resumption(root)
    before = evaluation(root)
    shutil.copytree(root, tmp_path / "copy")
    assert provenance.is_same(before, evaluation(tmp_path / "copy"))
    check_resumption(tmp_path / "copy")
    write(root / f"test{ending}", 7)
    assert not provenance.is_same(before, evaluation(root))
    check_resumption(root)
    write(root / f"train{ending}", 8)
    with tiny.refused("other training images"):
        check_resumption(root)


def test_a_run_is_not_measured_if_its_training_images_were_replaced(tmp_path):
    settings = {"data__name": "npz", "data__data_dir": str(tmp_path / "set.npz")}
    write_npz(tmp_path / "set.npz", 0)
    config, workdir = tiny.config(**settings), tmp_path / "run"
    tiny.untrained(workdir, config)
    then = splits.describe_data(config, "train").summary()
    record.record_data(workdir, record.DataSummary(*then))
    assert trained.load(config, workdir).step == 1
    write_npz(tmp_path / "set.npz", 1)
    now = splits.describe_data(config, "train").summary()
    with tiny.refused("other training images", then[2], now[2], "held out now"):
        trained.load(config, workdir)
    allowing = tiny.config(**settings, train__allow_changes=("data.",))
    assert trained.load(allowing, workdir).step == 1
    assert trained.load(config, workdir, uses_data=False).step == 1


def test_a_run_without_a_fingerprint_adopts_one_and_says_so(tmp_path, capsys):
    (tmp_path / record.DATA_FILE).write_text('{"num_examples": 5, "image_shape": [4, 4, 3]}')
    data = record.DataSummary(5, (4, 4, 3), "abc")
    record.check_data(tiny.config(), tmp_path, data)
    for _ in range(2):
        record.record_data(tmp_path, data)
    [line] = capsys.readouterr().out.splitlines()
    assert "has no fingerprint" in line
    assert record._recorded_data(tmp_path) == data


@pytest.mark.parametrize("name", ["evaluation.json", "samples.npz"])
def test_a_result_without_a_fingerprint_adopts_one_and_says_so(name, tmp_path, capsys):
    path, config = tmp_path / name, tiny.config()

    def wanted(content):
        return provenance.identity(dependences.EVALUATION, config, 3, data=lambda _: content)

    def is_current(content, writes=True):
        return files.read(
            path, lambda saved: provenance.is_current(path, saved, wanted(content), writes)
        )

    old = wanted(None)
    if name.endswith("json"):
        files.write_json(path, old | {"bits_per_dim": 2.0})
    else:
        files.write_npz(path, identity=json.dumps(old), bits_per_dim=2.0)
    before = path.read_bytes()
    assert is_current("b", writes=False)
    assert is_current("")  # an embedded set
    assert path.read_bytes() == before
    for _ in range(2):
        assert is_current("a")
    [line] = capsys.readouterr().out.splitlines()
    assert "has no fingerprint of the data of test" in line
    assert not is_current("b")
    assert files.read(path, lambda saved: float(saved["bits_per_dim"])) == 2.0


def test_prepared_records_have_the_fingerprint_of_their_files(tmp_path):
    fingerprints = []
    for seed in (0, 0, 1):
        images = np.random.default_rng(seed).integers(0, 256, (3, 32, 32, 3), np.uint8)
        place = tmp_path / str(len(fingerprints))
        write_cifar10(place, {"train": (images, np.arange(3))})
        source = splits.describe("cifar10", "train", data_dir=str(place))
        fingerprints.append(source.fingerprint())
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    with mock_tfds(num_examples=5):
        assert splits.describe("cifar10", "train").fingerprint() == ""


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("dataset_info.json", b""),
        ("dataset_info.json", b"[]"),
        ("cifar10-train.array_record-00000-of-00001", b"short"),
    ],
)
def test_damaged_prepared_records_are_refused(file, content, tmp_path):
    place = write_cifar10(tmp_path, {"train": (np.zeros((3, 32, 32, 3), np.uint8), np.arange(3))})
    (place / file).write_bytes(content)
    with pytest.raises(ConfigError, match="damaged"):
        splits.load("cifar10", "train", data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["huggingface:mnist", "cifar10/a=1"])
def test_only_own_sets_of_tensorflow_datasets_are_looked_up(name):
    with pytest.raises(ConfigError, match="arguments or a namespace"):
        splits.describe(name, "train")
