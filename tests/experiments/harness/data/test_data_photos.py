"""Crops of photographs: every one found in its photograph, at places that stay the same."""

import pickle

import numpy as np
import pytest

from experiments.harness.data.sources import embedded
from experiments.harness.data.splits import describe, load
from experiments.harness.errors import ConfigError

pytest.importorskip("skimage", reason="photos needs scikit-image", exc_type=ImportError)
# Photograph, row and column of the first three crops.
FIRST = {
    "train": [[0, 264, 95], [1, 311, 258], [3, 195, 6]],
    "test": [[1, 351, 461], [0, 188, 22], [1, 364, 546]],
}
SIZES = {"train": 50_000, "validation": 1_000, "test": 2_000}


@pytest.fixture(scope="module")
def sources():
    return {split: describe("photos", split) for split in SIZES}


def test_description(sources):
    for split, source in sources.items():
        assert source[:3] == (SIZES[split], (32, 32, 3), 256)
        assert source.num_classes == 0
    loaded = load("photos", "validation")
    assert loaded.images.shape == (1_000, 32, 32, 3)
    assert loaded.labels is None


def test_photographs_are_the_packages_own(sources):
    from skimage import data
    from sklearn.datasets import load_sample_image

    named = {
        "train": [data.astronaut(), data.coffee(), load_sample_image("china.jpg")],
        "validation": [data.rocket()],
        "test": [data.chelsea(), load_sample_image("flower.jpg")],
    }
    for split, photographs in named.items():
        ours = sources[split].get.photographs
        for photograph in photographs:
            assert any(np.array_equal(photograph, other) for other in ours)


def test_no_photograph_is_in_two_splits(sources):
    photographs = [p.tobytes() for source in sources.values() for p in source.get.photographs]
    assert len(set(photographs)) == len(photographs) == 7


def test_crops_lie_within_their_photographs(sources):
    for source in sources.values():
        which, row, column = source.get.corners.T
        sizes = np.array([p.shape[:2] for p in source.get.photographs])[which]
        assert (row >= 0).all()
        assert (column >= 0).all()
        assert (row + 32 <= sizes[:, 0]).all()
        assert (column + 32 <= sizes[:, 1]).all()


def test_crops_are_uniform_over_places(sources):
    source = sources["train"]
    which, row, column = source.get.corners.T
    n = len(which)
    places = np.array([(p.shape[0] - 31) * (p.shape[1] - 31) for p in source.get.photographs])
    shares = places / places.sum()
    error = np.sqrt(shares * (1 - shares) / n)
    np.testing.assert_allclose(np.bincount(which) / n, shares, atol=4 * error.max())
    # A uniform variable has mean ½ and variance 1/12 once it is scaled to (0, 1).
    for place, axis in ((row, 0), (column, 1)):
        counts = np.array([p.shape[axis] - 31 for p in source.get.photographs])[which]
        assert abs(((place + 0.5) / counts).mean() - 0.5) < 4 / np.sqrt(12 * n)


def test_places_are_for_good(sources):
    # A run is resumed, and its test repeated, on other machines.
    assert sources["train"].get.corners[:3].tolist() == FIRST["train"]
    assert sources["test"].get.corners[:3].tolist() == FIRST["test"]


def test_get_equals_read(sources):
    images, _ = sources["test"].read()
    get = pickle.loads(pickle.dumps(sources["test"].get))
    for index in (0, 7, 1999):
        image, label = get(index)
        np.testing.assert_array_equal(image, images[index])
        assert label is None


def test_missing_package_says_what_to_install(monkeypatch):
    embedded._photograph.cache_clear()
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="skimage is not installed; run pip install scikit-image"):
        describe("photos", "train")
    with pytest.raises(ConfigError, match="photos has only train, validation, test"):
        describe("photos", "all", splits={"all": "train"})
