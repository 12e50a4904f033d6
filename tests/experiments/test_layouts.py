"""The main job on each layout of data that docs/running.md lists, and on data that was replaced."""

import json
import pathlib
import struct

import numpy as np
import pytest
from PIL import Image

from experiments import all as main_job
from experiments.harness.data import splits
from tests.experiments import tiny
from tests.mock_cifar10 import write_cifar10

pytestmark = pytest.mark.usefixtures("quick_compiles")

SIZES = {"train": 40, "validation": 9, "test": 11}
ALL = 50  # a tenth each for validation and test leaves 40, as in SIZES, so that programs are shared
SPELT = {"train": "Train", "validation": "val", "test": "testing"}


def arrays(number: int, seed: int = 0, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images, and labels of three classes."""
    images = np.random.default_rng(seed).integers(0, 256, (number, *(shape or (8, 8, 1))), np.uint8)
    return images, np.arange(number) % 3


def save_npz(path: pathlib.Path, number: int, seed: int = 0) -> pathlib.Path:
    path.parent.mkdir(exist_ok=True)
    images, labels = arrays(number, seed)
    np.savez(path, images=images, labels=labels)
    return path


def save_images(folder: pathlib.Path, number: int, classes: bool = True) -> None:
    for i, (image, label) in enumerate(zip(*arrays(number), strict=True)):
        path = folder / (f"class {label}" if classes else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)


def folder_of_splits(root):
    for split, number in SIZES.items():
        save_images(root / split, number)


def folder_of_other_spellings_one_deeper(root):
    for split, number in SIZES.items():
        save_images(root / "set" / SPELT[split], number, classes=False)


def folder_unsplit(root):
    save_images(root, ALL)


def npz_of_splits(root):
    for split, number in SIZES.items():
        save_npz(root / f"{split}.npz", number)


def npz_without_validation(root):
    for split in ("train", "test"):
        save_npz(root / f"{split}.npz", SIZES[split])


def npz_single(root):
    return save_npz(root / "all.npz", ALL)


def idx(root):
    root.mkdir()
    for stem, number in (("train", 48), ("t10k", SIZES["test"])):
        for name, array in zip(
            ("images-idx3", "labels-idx1"), arrays(number, 0, 8, 8), strict=True
        ):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            content = header + array.astype(np.uint8).tobytes()
            (root / f"{stem}-{name}-ubyte").write_bytes(content)


def cifar10(root):
    write_cifar10(root, {name: arrays(SIZES[name], 0, 32, 32, 3) for name in ("train", "test")})


HELD = round(0.1 * ALL)  # of a set that is split at random
LAYOUTS = {
    folder_of_splits: ("folder", (40, 9, 11)),
    folder_of_other_spellings_one_deeper: ("folder", (40, 9, 11)),
    folder_unsplit: ("folder", (ALL - 2 * HELD, HELD, HELD)),
    npz_of_splits: ("npz", (40, 9, 11)),
    npz_without_validation: ("npz", (36, 4, 11)),
    npz_single: ("npz", (ALL - 2 * HELD, HELD, HELD)),
    idx: ("idx", (44, 4, 11)),
    cifar10: ("cifar10", (36, 4, 11)),
}


def config_of(layout, directory):
    """The main job at two steps, on data that are written in this layout."""
    name = LAYOUTS[layout][0]
    root = layout(directory / "data") or directory / "data"
    settings = {"data__name": name, "data__data_dir": str(root), "data__channels": 1}
    if name in ("folder", "cifar10"):
        settings["data__image_size"] = 8
    if name == "cifar10":
        settings |= {"data__splits__train": "train[:36]", "data__splits__validation": "train[36:]"}
    settings |= {"train__num_steps": 2, "train__batch_size": 8, "sample__num_samples": 2}
    return tiny.config(schedule__num_timesteps=4, **settings)


def evaluation(workdir):
    return json.loads((workdir / "evaluation.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_the_main_job_runs_on_each_layout_and_counts_its_images(layout, tmp_path):
    config = config_of(layout, tmp_path)
    main_job.run(config, tmp_path / "run")
    trained_on = json.loads((tmp_path / "run" / "data.json").read_text())["num_examples"]
    validation = splits.describe_data(config, "validation").num_examples
    tested_on = evaluation(tmp_path / "run")["num_examples"]
    assert (trained_on, validation, tested_on) == LAYOUTS[layout][1]


def test_a_replaced_test_set_is_evaluated_anew(tmp_path, capsys):
    config = config_of(npz_of_splits, tmp_path)
    main_job.run(config, tmp_path / "run")
    before = evaluation(tmp_path / "run")
    save_npz(tmp_path / "data" / "test.npz", SIZES["test"], seed=1)
    capsys.readouterr()
    main_job.run(config, tmp_path / "run")
    assert "is finished" not in capsys.readouterr().out
    assert evaluation(tmp_path / "run")["bits_per_dim"] != before["bits_per_dim"]
    main_job.run(config, tmp_path / "run")
    assert "is finished" in capsys.readouterr().out
