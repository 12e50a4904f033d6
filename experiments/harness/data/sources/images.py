"""An image file decoded to pixels of one size."""

import re
import struct
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Counted, but not read.
NOT_READ = (".jfif", ".avif", ".tga", ".pnm", ".pbm", ".jp2", ".heic", ".heif", ".jpe", ".jxl")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_BITS_PER_SAMPLE = 258  # a TIFF tag

# Pillow's remarks on damaged files would stand between the lines of this program.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnusableImage(ValueError):
    """An undamaged image that has no 8-bit grey levels; the message gives the reason."""


def decode(path: Path, size: int, channels: int) -> UInt8[np.ndarray, "size size channels"]:
    """The `pixels` of an image file, cropped and resized by `square`."""
    return square(pixels(path, channels), size)


def pixels(path: Path, channels: int) -> UInt8[np.ndarray, "h w channels"]:
    """The pixels of an image file.

    Palettes become colours, and an opaque alpha channel is dropped.

    Args:
      path: the file. Of several frames the first one is taken.
      channels: 3, or 1 for ITU-R 601's luma.

    Raises:
      OSError: if the file is damaged. Pillow raises other errors too: see `CORRUPT`.
      UnusableImage: if it has 16 bits, transparent pixels, or too many pixels.
    """
    from PIL import Image, ImageOps

    if not path.is_file():  # a named pipe would wait for ever
        raise OSError("it is no regular file")
    try:
        image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise UnusableImage(f"it is too large ({error})") from error
    with image:
        if image.mode in ("LAB", "HSV"):
            raise UnusableImage(f"its colours are {image.mode} and not RGB")
        if image.mode not in _MODES or _is_16_bit(path, image):
            raise UnusableImage(f"it has more than 8 bits a channel (mode {image.mode})")
        image.load()
        # The orientation of the camera.
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema()[0] < 255:
                raise UnusableImage("it has transparent pixels")
        image = image.convert("RGB" if channels == 3 else "L")
        return np.asarray(image).reshape(image.height, image.width, channels)


def square(image: UInt8[np.ndarray, "h w c"], size: int) -> UInt8[np.ndarray, "size size c"]:
    """The largest centred square of an image, resized.

    Lanczos' kernel, widened by the scale for smaller results, which avoids aliasing. It acts on the
    grey levels, which are no linear intensities. A square of the right size is not changed.
    """
    from PIL import Image

    height, width, channels = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    if side == size:
        return image
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(picture).reshape(size, size, channels)


# The errors of Pillow's decoders at damaged files. UnidentifiedImageError is an OSError.
CORRUPT = (OSError, SyntaxError, EOFError, IndexError, OverflowError, ValueError, struct.error)


def _is_16_bit(path: Path, image: object) -> bool:
    """Whether a file has 16 bits a channel, which Pillow would silently cut to 8."""
    if image.format == "PNG":
        with open(path, "rb") as file:
            return file.read(25)[24] > 8  # the header's bit depth
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8
    if image.format == "PPM":
        return _ppm_max(path) > 255
    return False


def _ppm_max(path: Path) -> int:
    """The largest value in the header of a netpbm file; 1 for a bitmap."""
    with open(path, "rb") as file:
        header = re.sub(rb"#[^\n]*", b" ", file.read(4096))
    magic, _, _, largest = header.split(maxsplit=4)[:4]
    return 1 if magic in (b"P1", b"P4") else int(largest)
