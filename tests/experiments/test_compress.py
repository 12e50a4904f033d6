"""Compression from the command line: files, reports, folders, and what is refused."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from diffusion.coding import ORDERS
from experiments import compress
from experiments.harness import command_line
from experiments.harness.compression import general
from experiments.harness.compression.codec import Codec
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError, RunError
from tests.experiments import tiny

pytest.importorskip("constriction")
pytestmark = pytest.mark.usefixtures("quick_compiles")

IMAGES = splits.load("digits", "test").images[:6]


def small_config(**overrides):
    """Six digits, with a Σ_θ that is as wide as the errors of a random network."""
    config = tiny.config()
    config.analytic.update(levels=5, examples=64)
    settings = {"num_images": 6, "num_timesteps": 4, "batch_size": 4}
    config.compress.update(settings | {"variance": "analytic_diagonal"} | overrides)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, quick_compiles):
    """A network of random weights."""
    return tiny.untrained(tmp_path_factory.mktemp("compress"), small_config(), scale=0.1)


@pytest.fixture(scope="module")
def report(workdir):
    return compress.compress(small_config(), workdir)


def test_a_file_is_decoded_to_its_images(workdir, report, capsys):
    assert report["file"] == str(workdir / "compressed" / "test.dlvm")
    assert report["is_verified"]
    compress.run(small_config(decompress=report["file"]), workdir)
    with np.load(workdir / "compressed" / "test.npz") as saved:
        np.testing.assert_array_equal(saved["images"], IMAGES)
    assert "6 images of shape (8, 8, 1), with the checksum of those" in capsys.readouterr().out


def test_the_parts_of_the_report_sum_up(workdir, report):
    size = (workdir / "compressed" / "test.dlvm").stat().st_size
    assert report["total"] == pytest.approx(8 * size / IMAGES.size)
    parts = (report[name] for name in ("header", "initial", "labels", "net"))
    assert report["total"] == pytest.approx(sum(parts))
    parts = (report[name] for name in ("trajectories", "grid", "coder"))
    assert report["net"] == pytest.approx(sum(parts))
    assert report["labels"] == 0
    assert abs(report["net_minus_bound"]) < 5 * report["net_minus_bound_se"]
    # Each image of the first batch borrows what the grids say, within a few bits.
    assert 0.8 < report["initial_per_image"] / report["peak_debt"] < 1.2


def test_the_report_is_kept(workdir, report):
    recorded = json.loads((workdir / "compressed" / "test.json").read_text())
    assert recorded["net"] == report["net"]
    assert recorded["order"] == "bit_swap"
    text = (workdir / "compressed" / "test.md").read_text()
    for name in ("**net**", "the coder adds", "PNG", "encoding", "decoding"):
        assert f"| {name} |" in text
    assert "6 images of 8×8×1, bit_swap, T = 4" in text


def folder_of(directory, images):
    for number, image in enumerate(images):
        Image.fromarray(np.squeeze(image)).save(directory / f"{number:03}.png")
    return str(directory)


def test_a_folder_of_images_is_compressed_in_the_order_of_names(workdir, tmp_path):
    folder = folder_of(tmp_path, IMAGES[::-1])
    report = compress.compress(small_config(images=folder, num_images=4), workdir)
    config = small_config(decompress=report["file"])
    np.testing.assert_array_equal(compress.decompress(config, workdir)[1], IMAGES[::-1][:4])


@pytest.mark.parametrize(
    ("image", "wrong"),
    [
        (np.zeros((8, 9), np.uint8), r"a grey image of \(8, 9\) pixels; .* the shape \(8, 8, 1\)"),
        (np.zeros((8, 8, 3), np.uint8) + np.uint8([1, 2, 3]), "is a coloured image"),
        (np.full((8, 8), 17, np.uint8), "the grey level 17; this run has the levels 0 to 16"),
    ],
)
def test_a_folder_with_another_image_is_one_line(image, wrong, workdir, tmp_path):
    folder_of(tmp_path, [IMAGES[0], image])
    with pytest.raises(ConfigError, match=wrong):
        compress.compress(small_config(images=str(tmp_path)), workdir)


def test_a_damaged_image_or_an_empty_folder_is_one_line(workdir, tmp_path):
    with pytest.raises(ConfigError, match="is no folder that holds images"):
        compress.compress(small_config(images=str(workdir)), workdir)
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"a\.png cannot be used"):
        compress.compress(small_config(images=str(tmp_path)), workdir)


def test_a_damaged_file_leaves_nothing(workdir, report, tmp_path, capsys):
    content = bytearray((workdir / "compressed" / "test.dlvm").read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "damaged.dlvm"
    path.write_bytes(content)
    before = tiny.files(workdir), tiny.files(tmp_path)
    assert command_line.run("compress", small_config(decompress=str(path)), str(workdir)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"error: {path} is truncated or damaged: its checksum differs"]
    with pytest.raises(ConfigError, match="cannot be read"):
        compress.decompress(small_config(decompress=str(tmp_path / "none.dlvm")), workdir)
    assert (tiny.files(workdir), tiny.files(tmp_path)) == before


def test_a_file_that_is_not_decoded_to_its_images_gets_no_name(workdir, tmp_path, monkeypatch):
    copy = tiny.copy(workdir, tmp_path)
    before = tiny.files(copy)
    decode = Codec.decode
    monkeypatch.setattr(Codec, "decode", lambda *arguments: decode(*arguments) ^ 1)
    with pytest.raises(RunError, match="are not those that were compressed"):
        compress.compress(small_config(split="validation"), copy)
    assert tiny.files(copy) == before


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"order": "other"}, f"is unknown; known: {', '.join(ORDERS)}"),
        ({"variance": "learned_range"}, "a learned Σ_θ needs a network that was trained with it"),
        ({"bins_per_std": 0.1}, r"config.compress.bins_per_std = 0\.1; it must be"),
        ({"spacing": "bound_optimal"}, r"config.compress.spacing = 'bound_optimal': there is no"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(settings, wrong, workdir):
    with pytest.raises(ConfigError, match=wrong):
        compress.compress(small_config(**settings), workdir)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_other_coders_lose_nothing(channels):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, channels), dtype=np.uint8)
    for name, encode in general.encoders().items():
        if name in general.FORMATS:
            decoded = np.asarray(Image.open(io.BytesIO(encode(image))).convert("RGB"))
            np.testing.assert_array_equal(decoded, np.broadcast_to(image, (9, 7, 3)), name)


def test_sizes_of_other_coders_count_every_image():
    sizes = general.sizes(np.concatenate([IMAGES] * 2))
    once = general.sizes(IMAGES)
    assert {"PNG", "gzip", "xz"} <= sizes.keys()
    for name, size in sizes.items():
        assert size.apart == pytest.approx(once[name].apart)
        assert size.together < size.apart
