import matplotlib.image
import numpy as np
import pytest

from experiments.harness.pictures.images import grid, save_png, strip
from experiments.harness.pictures.plots import plot_kl_per_timestep, plot_rate_distortion


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_pixel_for_pixel(channels):
    images = random_images(5, 4, 6, channels)
    picture = grid(images, columns=2, scale=3)
    assert picture.shape == (3 * 13 - 1, 2 * 19 - 1, channels)
    used = np.zeros(picture.shape, bool)
    for i, image in enumerate(images):
        top, left = 13 * (i // 2), 19 * (i % 2)
        used[top : top + 12, left : left + 18] = True
        for dy in range(3):
            for dx in range(3):
                cells = picture[top + dy : top + 12 : 3, left + dx : left + 18 : 3]
                np.testing.assert_array_equal(cells, image)
    # Between them and in the place of a sixth, one colour.
    assert len(np.unique(picture[~used])) == 1


@pytest.mark.parametrize(("size", "height"), [(8, 64), (28, 56), (32, 64), (64, 64), (256, 256)])
def test_by_default_a_grid_is_square_and_its_images_large_enough_to_see(size, height):
    picture = grid(random_images(9, size, size, 1))
    assert picture.shape == (3 * (height + 1) - 1, 3 * (height + 1) - 1, 1)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((4, 8, 8, 1), np.float32),
        np.zeros((4, 8, 8), np.uint8),
        np.zeros((4, 8, 8, 2), np.uint8),
        np.zeros((0, 8, 8, 1), np.uint8),
    ],
)
def test_what_is_no_stack_of_images_is_named(images):
    with pytest.raises(ValueError, match="images is"):
        grid(images)


def test_a_strip_has_a_row_for_each_example_and_a_column_for_each_moment():
    images = random_images(3, 2, 4, 4, 3)
    picture = strip(images, scale=1)
    assert picture.shape == (2 * 5 - 1, 3 * 5 - 1, 3)
    for moment in range(3):
        for example in range(2):
            tile = picture[5 * example : 5 * example + 4, 5 * moment : 5 * moment + 4]
            np.testing.assert_array_equal(tile, images[moment, example])


@pytest.mark.parametrize("channels", [1, 3])
def test_captions_stand_above_their_columns_and_change_nothing_below(channels):
    images = random_images(3, 2, 8, 8, channels)
    plain = strip(images)
    captioned = strip(images, captions=["t = 9", "", "t = 1000000000"])
    height = len(captioned) - len(plain)
    np.testing.assert_array_equal(captioned[height:], plain)
    ink = (captioned[:height] < 128).any(axis=(0, 2))
    assert ink[:64].any()
    assert not ink[64:130].any()
    assert ink[130:].any()
    with pytest.raises(ValueError, match="captions has 1 texts: it must have 3"):
        strip(images, captions=["t"])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_same_pixels(tmp_path, channels):
    picture = random_images(5, 7, channels)
    path = tmp_path / "samples" / "grid.png"
    save_png(path, picture)
    read = np.round(matplotlib.image.imread(path) * 255).astype(np.uint8)
    np.testing.assert_array_equal(read.reshape(picture.shape), picture)


@pytest.mark.parametrize("num_timesteps", [1, 2, 10_000])
def test_the_bound_is_drawn_at_any_number_of_timesteps(tmp_path, num_timesteps):
    log_snr = np.linspace(9, -9, num_timesteps)
    kl = np.exp(-(log_snr[1:] ** 2) / 8)
    plot_kl_per_timestep(
        tmp_path / "kl.png", kl=kl, log_snr=log_snr, prior=1e-4, reconstruction=0.4, kl_se=kl / 9
    )
    plot_rate_distortion(
        tmp_path / "rate.png",
        kl=kl,
        prior=1e-4,
        rmse=np.linspace(1, 5, num_timesteps),
        max_value=16,
    )
    for name in ("kl.png", "rate.png"):
        picture = matplotlib.image.imread(tmp_path / name)[..., :3]
        assert picture.shape[0] >= 500
        assert picture.std() > 0.03


def test_arrays_that_do_not_fit_the_kl_are_named(tmp_path):
    kl, levels = np.ones(3), np.linspace(4, -4, 4)
    bound = {"kl": kl, "prior": 0.0, "reconstruction": 0.4}
    with pytest.raises(ValueError, match=r"log_snr is \(3,\): it must be \(4,\)"):
        plot_kl_per_timestep(tmp_path / "a.png", log_snr=levels[1:], **bound)
    with pytest.raises(ValueError, match="log_snr rises"):
        plot_kl_per_timestep(tmp_path / "a.png", log_snr=levels[::-1], **bound)
    with pytest.raises(ValueError, match=r"kl_se is \(4,\): it must be \(3,\)"):
        plot_kl_per_timestep(tmp_path / "a.png", log_snr=levels, kl_se=np.ones(4), **bound)
    with pytest.raises(ValueError, match=r"rmse is \(3,\): it must be \(4,\)"):
        plot_rate_distortion(tmp_path / "a.png", kl=kl, prior=0.0, rmse=kl, max_value=255)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_adds_no_noise_is_no_obstacle(tmp_path):
    plot_kl_per_timestep(
        tmp_path / "kl.png",
        kl=np.array([0.0, 0.5, 0.2]),
        log_snr=np.array([4.0, 4.0, 0.0, -4.0]),
        prior=0.0,
        reconstruction=0.4,
    )
    assert (tmp_path / "kl.png").exists()
