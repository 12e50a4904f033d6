"""Image files for the tests of folders."""

import numpy as np
from PIL import Image

from experiments.harness.data.sources.source import Options
from experiments.harness.data.splits import describe, load


def random_image(seed: int, height: int = 32, width: int = 32, channels: int = 3) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, pixels, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **settings)
    return path


def load_folder(root, split, splits=None, **options):
    splits = {"train": "train", "validation": "validation", "test": "test", **(splits or {})}
    options = Options(**{"image_size": 32} | options)
    arguments = {"data_dir": str(root), "splits": splits, "options": options}
    described = describe("folder", split, **arguments)
    loaded = load("folder", split, **arguments)
    assert loaded.images.shape == (described.num_examples, *described.image_shape)
    assert (loaded.images.dtype, loaded.num_levels) == (np.uint8, 256)
    return described, loaded


def png_of_16_bits(colour: bool) -> bytes:
    """A 2×2 image by the PNG specification: Pillow cannot write colour of 16 bits."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2 if colour else 0, 0, 0, 0)
    rows = 2 * (b"\0" + bytes(range(12 if colour else 4)))
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
