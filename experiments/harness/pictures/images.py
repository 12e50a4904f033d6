"""Images as PNG files. Of several processes only the first one writes."""

import io
import math
from collections.abc import Sequence

import numpy as np
from etils import epath

from experiments.harness.processes import distributed

_TILE = 64  # pixels: the default scale enlarges small images to about this size
_SEPARATOR = 96
_CAPTION_HEIGHT = 18
_CAPTION_FONT = 12


def grid(images: np.ndarray, columns: int | None = None, scale: int | None = None) -> np.ndarray:
    """Arranges images in rows, separated by lines of one pixel.

    Args:
      images: uint8 [n, h, w, c], n ≥ 1, c = 1 (grey) or 3 (RGB).
      columns: images in a row; by default about the number of rows.
      scale: each pixel becomes scale × scale pixels; by default an image becomes about 64 pixels
        wide.

    Returns:
      uint8 [rows · (h · scale + 1) − 1, columns · (w · scale + 1) − 1, c].

    Raises:
      ValueError: if `images` has another shape or type.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images is {images.dtype} {images.shape}: it must be uint8 [n, h, w, c], c = 1 or 3"
        )
    n, h, w, c = images.shape
    if n == 0:
        raise ValueError(f"images is {images.shape}: it must hold at least one image")
    columns = columns or math.ceil(math.sqrt(n))
    scale = scale or max(1, _TILE // max(h, w))
    rows = math.ceil(n / columns)
    tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)
    tiles = np.pad(tiles, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=_SEPARATOR)
    tiles = np.pad(
        tiles, ((0, rows * columns - n), (0, 0), (0, 0), (0, 0)), constant_values=_SEPARATOR
    )
    height, width = tiles.shape[1:3]
    table = tiles.reshape(rows, columns, height, width, c).swapaxes(1, 2)
    return table.reshape(rows * height, columns * width, c)[:-1, :-1]


def strip(
    images: np.ndarray, captions: Sequence[str] | None = None, scale: int | None = None
) -> np.ndarray:
    """Trajectories as a table: a row for each example, a column for each frame.

    Args:
      images: uint8 [k, n, h, w, c], k frames of n examples.
      captions: k short texts above the columns, such as "t = 500".
      scale: as for `grid`.

    Returns:
      uint8 [height, width, c].

    Raises:
      ValueError: if `images` has another shape, or the number of captions is not k.
    """
    images = np.asarray(images)
    if images.ndim != 5:
        raise ValueError(f"images is {images.shape}: it must be [k, n, h, w, c]")
    num_frames = images.shape[0]
    table = grid(np.concatenate(images.swapaxes(0, 1)), num_frames, scale)
    if captions is None:
        return table
    if len(captions) != num_frames:
        raise ValueError(f"captions has {len(captions)} texts: it must have {num_frames}")
    return np.concatenate([_captions(captions, table.shape[1], table.shape[2]), table])


def save_png(path: epath.PathLike, array: np.ndarray) -> None:
    """Writes an image to a PNG file, losslessly.

    Args:
      path: the file; its directory is created if missing.
      array: uint8 [h, w, c], c = 1 (grey) or 3 (RGB).
    """
    from PIL import Image

    array = np.asarray(array)
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, format="PNG")
    write_image(path, buffer)


def _captions(captions: Sequence[str], width: int, channels: int) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    banner = Image.new("L", (width, _CAPTION_HEIGHT), 255)
    draw = ImageDraw.Draw(banner)
    cell = (width + 1) / len(captions)
    font = ImageFont.load_default(_CAPTION_FONT)
    widest = max(draw.textlength(text, font=font) for text in captions)
    if widest > cell - 4:
        font = ImageFont.load_default(_CAPTION_FONT * (cell - 4) / widest)
    for i, text in enumerate(captions):
        draw.text(((i + 0.5) * cell, _CAPTION_HEIGHT / 2), text, fill=0, font=font, anchor="mm")
    return np.asarray(banner)[..., None].repeat(channels, axis=-1)


def write_image(path: epath.PathLike, buffer: io.BytesIO) -> None:
    """Writes the bytes of an image file, in the first process only."""
    if not distributed.is_first():
        return
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
