"""An image file decoded to pixels of one size."""

import re
import struct
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_BITS_PER_SAMPLE = 258  # a TIFF tag


class UnusableImage(ValueError):
    """An image that is whole, but not of 8-bit grey levels; the message says what it is."""


def decode(path: Path, size: int, channels: int) -> UInt8[np.ndarray, "size size channels"]:
    """An image file as `square` makes it.

    Palettes are looked up, and an opaque alpha channel is dropped.

    Args:
      path: of the file; the first frame of one that has several.
      size: side of the result.
      channels: 3, or 1 for ITU-R 601's luma.

    Raises:
      OSError: if the file is damaged. Pillow raises others besides: see `CORRUPT`.
      UnusableImage: if it has 16 bits, transparent pixels, or more of them than is safe to decode.
    """
    from PIL import Image, ImageOps

    try:
        image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise UnusableImage(f"it is too large ({error})") from error
    with image:
        if image.mode not in _MODES or _is_16_bit(path, image):
            raise UnusableImage(f"it has more than 8 bits a channel (mode {image.mode})")
        image.load()
        # As a photograph is meant to be seen, whichever way the camera was held.
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema()[0] < 255:
                raise UnusableImage("it has transparent pixels")
        image = image.convert("RGB" if channels == 3 else "L")
        return square(np.asarray(image).reshape(image.height, image.width, channels), size)


def square(image: UInt8[np.ndarray, "h w c"], size: int) -> UInt8[np.ndarray, "size size c"]:
    """The largest centred square of an image, resized.

    It is resized by Lanczos' kernel, widened by the scale where the image is made smaller, so that
    nothing aliases; in the values as they are, which are no linear intensities. A square of the
    right size is taken as it is.
    """
    from PIL import Image

    height, width, channels = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    if side == size:
        return image
    made = Image.fromarray(image[..., 0] if channels == 1 else image)
    made = made.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(made).reshape(size, size, channels)


# What Pillow's decoders raise for damaged files. UnidentifiedImageError is an OSError.
CORRUPT = (OSError, SyntaxError, EOFError, IndexError, OverflowError, ValueError, struct.error)


def _is_16_bit(path: Path, image: object) -> bool:
    """Whether a file has 16 bits a channel that Pillow would cut to 8 without a word."""
    if image.format == "PNG":
        with open(path, "rb") as file:
            return file.read(25)[24] > 8  # the header's bit depth
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8
    if image.format == "PPM":
        return _ppm_max(path) > 255
    return False


def _ppm_max(path: Path) -> int:
    """The largest value that the header of a netpbm file says; 1 where it has only bits."""
    with open(path, "rb") as file:
        header = re.sub(rb"#[^\n]*", b" ", file.read(4096))
    magic, _, _, largest = header.split(maxsplit=4)[:4]
    return 1 if magic in (b"P1", b"P4") else int(largest)
