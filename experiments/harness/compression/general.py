"""General-purpose lossless coders on the same images, for comparison."""

import gzip
import importlib
import importlib.util
import io
import lzma
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8


class Size(NamedTuple):
    """What a coder takes, in bits/dim.

    Attributes:
      apart: with a file for each image.
      together: with one file for all.
    """

    apart: float
    together: float


def sizes(images: UInt8[np.ndarray, "n h w c"]) -> dict[str, Size]:
    """What each installed coder takes.

    Together an image format gets all images as one picture, in rows, and the other coders get the
    bytes of the array.
    """
    picture = _picture(images)
    table = {}
    for name, encode in encoders().items():
        together = encode(picture if name in FORMATS else images)
        apart = sum(len(encode(image)) for image in images)
        table[name] = Size(*(8 * length / images.size for length in (apart, len(together))))
    return table


def encoders() -> dict[str, Callable[[np.ndarray], bytes]]:
    """The installed coders by name; each takes grey levels, and image formats one picture."""
    known = {name: _image_encoder(name) for name in FORMATS if _is_installed(name)}
    known["gzip"] = lambda images: gzip.compress(images.tobytes(), 9, mtime=0)
    known["xz"] = lambda images: lzma.compress(images.tobytes(), preset=6 | lzma.PRESET_EXTREME)
    if importlib.util.find_spec("zstandard"):
        zstandard = importlib.import_module("zstandard")
        known["zstd"] = lambda images: zstandard.compress(images.tobytes(), 22)
    return known


FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {"optimize": True},
    "WebP": {"lossless": True, "quality": 100, "method": 6, "exact": True},
    "JXL": {"lossless": True, "effort": 9},
}
"""Pillow's formats with the options of their smallest lossless files."""


def _image_encoder(name: str) -> Callable[[UInt8[np.ndarray, "h w c"]], bytes]:
    from PIL import Image

    def encode(image):
        buffer = io.BytesIO()
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        picture.save(buffer, format=name, **FORMATS[name])
        return buffer.getvalue()

    return encode


def _is_installed(name: str) -> bool:
    from PIL import Image, features

    if name == "JXL" and importlib.util.find_spec("pillow_jxl"):
        importlib.import_module("pillow_jxl")  # registers the format
    Image.init()
    return name.upper() in Image.SAVE and (name != "WebP" or features.check("webp"))


def _picture(images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "H W c"]:
    """All images in rows, with black ones at the end."""
    n, h, w, c = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    padded = np.zeros((rows * columns, h, w, c), np.uint8)
    padded[:n] = images
    return padded.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)
