"""Image files: their pixels against what was written, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from experiments.harness.data.sources.images import UnusableImage, decode
from tests.experiments.harness.data.image_files import (
    load_folder,
    png_of_16_bits,
    random_image,
    save,
)
from tests.experiments.tiny import refused


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_a_square_of_the_right_size_is_read_exactly(suffix, tmp_path):
    pixels = random_image(0)
    path = save(
        tmp_path / f"a.{suffix}", pixels, **({"lossless": True} if suffix == "webp" else {})
    )
    np.testing.assert_array_equal(decode(path, 32, 3), pixels)


def test_grey_becomes_three_equal_channels_or_stays_one(tmp_path):
    pixels = random_image(0, channels=1)
    path = save(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(decode(path, 32, 1), pixels[:, :, None])
    np.testing.assert_array_equal(decode(path, 32, 3), np.repeat(pixels[:, :, None], 3, axis=2))


def test_colour_becomes_luma(tmp_path):
    path = save(tmp_path / "a.png", np.full((8, 8, 3), (200, 100, 50), np.uint8))
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B.
    np.testing.assert_allclose(decode(path, 8, 1), 124.2, atol=1)


def test_palette_is_looked_up(tmp_path):
    palette = random_image(1, 16, 1).reshape(16, 3)
    indices = np.random.default_rng(0).integers(0, 16, (32, 32), np.uint8)
    image = Image.frombytes("P", (32, 32), indices.tobytes())
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == "P"
    np.testing.assert_array_equal(decode(tmp_path / "a.png", 32, 3), palette[indices])


@pytest.mark.parametrize("channels", [2, 4])
def test_an_opaque_alpha_channel_is_dropped_and_a_transparent_one_refused(channels, tmp_path):
    pixels = random_image(0, channels=channels)
    pixels[..., -1] = 255
    save(tmp_path / "a.png", pixels)
    expected = pixels[..., : channels - 1]
    np.testing.assert_array_equal(decode(tmp_path / "a.png", 32, channels - 1), expected)
    pixels[3, 5, -1] = 254
    save(tmp_path / "b.png", pixels)
    with pytest.raises(UnusableImage, match="transparent"):
        decode(tmp_path / "b.png", 32, 3)


@pytest.mark.parametrize("colour", [False, True])
def test_16_bits_are_refused(colour, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    path = tmp_path / "test" / "deep.png"
    path.write_bytes(png_of_16_bits(colour))
    with refused(str(path), "more than 8 bits", "convert it"):
        load_folder(tmp_path, "test", image_size=2)


def test_a_netpbm_file_says_how_deep_it_is(tmp_path):
    pixels = random_image(0, 2, 2)
    for largest, dtype in ((255, ">u1"), (65535, ">u2")):
        header = f"P6 # 3 colours\n2 2\n{largest}\n".encode()
        (tmp_path / "a.ppm").write_bytes(header + pixels.astype(dtype).tobytes())
        if largest == 255:
            np.testing.assert_array_equal(decode(tmp_path / "a.ppm", 2, 3), pixels)
        else:
            with pytest.raises(UnusableImage, match="more than 8 bits"):
                decode(tmp_path / "a.ppm", 2, 3)


def test_float_image_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UnusableImage, match="mode F"):
        decode(tmp_path / "a.tif", 4, 1)


@pytest.mark.parametrize(("height", "width"), [(32, 47), (51, 32), (33, 32)])
def test_the_square_is_the_centre(height, width, tmp_path):
    pixels = random_image(0, height, width)
    top, left = (height - 32) // 2, (width - 32) // 2
    expected = pixels[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(decode(save(tmp_path / "a.png", pixels), 32, 3), expected)


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    pixels = random_image(0)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[274] = 6  # the top row of the file is the right column of the picture
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(decode(tmp_path / "a.png", 32, 3), np.rot90(pixels, -1))


@pytest.mark.parametrize("period", [1, 2])
def test_resizing_does_not_alias(period, tmp_path):
    # All of a checkerboard's frequencies are beyond what a 16-fold smaller image can hold.
    row, column = np.indices((512, 512)) // period
    board = (255 * ((row + column) % 2)).astype(np.uint8)
    small = decode(save(tmp_path / "a.png", board), 32, 1)
    # Taking every sixteenth pixel would give a constant 0 or 255. At the border the kernel is cut.
    np.testing.assert_allclose(small[2:-2, 2:-2], 127.5, atol=1)
    np.testing.assert_allclose(small, 127.5, atol=8)


def test_resizing_keeps_a_ramp(tmp_path):
    # A kernel that is symmetric and sums to one maps a linear ramp to the ramp at pixel centres.
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    small = decode(save(tmp_path / "a.png", ramp), 32, 1)[:, :, 0]
    expected = 8 * (np.arange(32) + 0.5) - 0.5
    np.testing.assert_allclose(small[:, 3:-3], np.tile(expected[3:-3], (32, 1)), atol=1)
