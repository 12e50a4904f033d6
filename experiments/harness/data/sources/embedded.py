"""Sets that other packages contain: digits, and crops of photographs. Nothing to download."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from experiments.harness.data.sources.source import Source, read_each
from experiments.harness.errors import ConfigError

# In scikit-learn's order, which is by writer: the splits have different writers, so they are no
# iid samples of one population.
_DIGITS = {"train": slice(0, 1000), "validation": slice(1000, 1350), "test": slice(1350, None)}


def digits(split: str) -> Source:
    """scikit-learn's handwritten digits: 1797 images, 8×8×1, each pixel a count from 0 to 16.

    The UCI test set of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (1998).

    Raises:
      ConfigError: for an unknown split.
    """
    check_split("digits", split, _DIGITS)
    images, labels = (array[_DIGITS[split]] for array in _all_digits())
    return Source(
        len(images), images.shape[1:], num_levels=17, read=lambda: (images, labels), num_classes=10
    )


@functools.cache
def _all_digits() -> tuple[UInt8[np.ndarray, "1797 8 8 1"], Int32[np.ndarray, "1797"]]:
    """All images and labels, read once from a text file."""
    from sklearn.datasets import load_digits

    shipped = load_digits()
    arrays = shipped.images[..., None].astype(np.uint8), shipped.target.astype(np.int32)
    for array in arrays:
        array.flags.writeable = False
    return arrays


CROP = 32
# By package and file. No two splits share a photograph, nor the two views of the motorcycle.
_PHOTOGRAPHS = {
    "train": (
        ("skimage", "data/astronaut.png"),
        ("skimage", "data/coffee.png"),
        ("skimage", "data/motorcycle_left.png"),
        ("sklearn", "datasets/images/china.jpg"),
    ),
    "validation": (("skimage", "data/rocket.jpg"),),
    "test": (("skimage", "data/chelsea.png"), ("sklearn", "datasets/images/flower.jpg")),
}
_NUM_CROPS = {"train": 50_000, "validation": 1_000, "test": 2_000}
_KEYS = {"train": 0, "validation": 1, "test": 2}


class Crops:
    """Square crops of photographs; pickled with the photographs.

    Attributes:
      photographs: photographs of any size.
      corners: for each crop its photograph, and the row and column of its upper left pixel.
    """

    def __init__(
        self, photographs: list[UInt8[np.ndarray, "h w 3"]], corners: Int64[np.ndarray, "n 3"]
    ):
        self.photographs, self.corners = photographs, corners

    def __call__(self, index: int) -> tuple[UInt8[np.ndarray, "32 32 3"], None]:
        photograph, row, column = self.corners[index]
        return self.photographs[photograph][row : row + CROP, column : column + CROP], None


def photos(split: str) -> Source:
    """Crops, 32×32×3, at fixed random places of photographs in scikit-learn and scikit-image.

    50,000 crops of four photographs for training, 1,000 of another for validation and 2,000 of two
    more for the test. Crops of a photograph overlap, and two photographs are a small population: a
    standard error over crops says little about other photographs. The pixels of a JPEG may differ
    by a level between versions of libjpeg.

    Raises:
      ConfigError: for an unknown split, or if a photograph is missing.
    """
    check_split("photos", split, _PHOTOGRAPHS)
    photographs = [_photograph(*file) for file in _PHOTOGRAPHS[split]]
    # Uniform over all places of all photographs.
    heights, widths = np.array([photograph.shape[:2] for photograph in photographs]).T
    rows, columns = heights - CROP + 1, widths - CROP + 1
    ends = np.cumsum(rows * columns)
    words = np.random.Philox(key=np.array([0, _KEYS[split]], np.uint64))
    drawn = (words.random_raw(_NUM_CROPS[split]) % np.uint64(ends[-1])).astype(np.int64)
    which = np.searchsorted(ends, drawn, side="right")
    row, column = np.divmod(drawn - (ends - rows * columns)[which], columns[which])
    get = Crops(photographs, np.stack([which, row, column], axis=1))
    shape, num_crops = (CROP, CROP, 3), _NUM_CROPS[split]
    read = functools.partial(read_each, get, num_crops, shape, f"photos {split}", labelled=False)
    return Source(num_crops, shape, num_levels=256, read=read, get=get)


@functools.lru_cache(maxsize=8)
def _photograph(package: str, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """A photograph's pixels; does not import its package, which takes seconds."""
    from PIL import Image

    spec = importlib.util.find_spec(package)
    folder = Path(spec.submodule_search_locations[0]) if spec else None
    if folder is None or not (folder / name).is_file():
        where = f"{folder / name} is missing" if folder else f"{package} is not installed"
        raise ConfigError(
            f"config.data.name = 'photos': {where}; run pip install scikit-image scikit-learn"
        )
    with Image.open(folder / name) as image:
        return np.asarray(image.convert("RGB"))


def check_split(name: str, split: str, known: dict) -> None:
    """Raises ConfigError if an embedded set has no such split."""
    if split not in known:
        raise ConfigError(f"split = {split!r}: {name} has only {', '.join(known)}")
