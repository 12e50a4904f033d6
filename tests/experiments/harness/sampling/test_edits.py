"""Inpainting, interpolation and encoding of test images, as pictures and as arrays."""

import numpy as np
import pytest

from experiments.harness.data import splits
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.sampling import edits
from experiments.harness.setup.definition import define_model
from experiments.sample import sample
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")

SMALL = {
    "sample__inpaint__num_samples": 3,
    "sample__inpaint__num_timesteps": 4,
    "sample__inpaint__num_resamplings": 2,
    "sample__interpolate__columns": 3,
    "sample__interpolate__num_timesteps": 20,
    "sample__encode__num_timesteps": 20,
}


def config(*also, **overrides):
    return tiny.config(sample__also=also, **SMALL | overrides)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, quick_compiles):
    """A model of small random weights. Shared: copy it before writing to it."""
    return tiny.untrained(tmp_path_factory.mktemp("edits"), tiny.config(), scale=0.05, step=3)


@pytest.fixture(scope="module")
def made(workdir, tmp_path_factory):
    """What the three of them left, by name."""
    copy = tiny.copy(workdir, tmp_path_factory.mktemp("made"))
    names = ("inpaint", "interpolate", "encode")
    sample(config(*names), copy)
    found = {}
    for name in names:
        assert (copy / "samples" / f"{name}.png").stat().st_size > 500
        with np.load(copy / "samples" / f"{name}.npz") as saved:
            found[name] = dict(saved)
    return found


def digits(n):
    """Test digits in data units."""
    definition = define_model(tiny.config())
    return np.asarray(definition.quantization.to_data(splits.load("digits", "test").images[:n]))


def test_inpainting_keeps_what_is_known_and_makes_the_rest(made):
    of = made["inpaint"]
    assert of["x_0"].shape == (2, 3, 8, 8, 1)
    known = np.broadcast_to(of["mask"], (2, 3, 8, 8, 1))
    truth = np.broadcast_to(digits(2)[:, None], known.shape)
    np.testing.assert_array_equal(of["x_0"][known], truth[known])
    # Two samples of one image differ where it is not known.
    assert np.abs(of["x_0"][:, 0] - of["x_0"][:, 1])[~known[:, 0]].min() > 0
    np.testing.assert_array_equal(of["mask"][:, :4], True)
    np.testing.assert_array_equal(of["mask"][:, 4:], False)


def test_encoded_images_are_decoded_to_themselves(made):
    """Every test image once; to first order in the length of a step, of a smooth network."""
    of = made["encode"]
    assert of["x_0"].shape == of["x_T"].shape == (447, 8, 8, 1)
    error = np.abs(of["x_0"] - digits(447)).mean() / 2
    assert of["mean_absolute_error"] == pytest.approx(error, rel=1e-5)
    assert error < 0.02


def test_interpolation_ends_at_what_its_images_are_decoded_to(made):
    """Rows pair the first images with the next ones: the ends are those that `encode` decodes."""
    of, decoded = made["interpolate"], made["encode"]["x_0"]
    np.testing.assert_array_equal(of["weights"], [0, 0.5, 1])
    assert of["x_0"].shape == (3, 2, 8, 8, 1)
    size = np.abs(decoded[:4]).max()
    np.testing.assert_allclose(of["x_0"][0], decoded[:2], atol=1e-3 * size)
    np.testing.assert_allclose(of["x_0"][2], decoded[2:4], atol=1e-3 * size)
    assert np.abs(of["x_0"][1] - of["x_0"][0]).max() > 0.1


@pytest.mark.parametrize("name", ["encode", "interpolate"])
def test_images_decoded_far_from_the_data_are_an_error(workdir, tmp_path, name):
    """One step of cosine's whole range, by an ε that is hardly trained."""
    overrides = {"schedule__name": "cosine", "model__parameterization": "eps"}
    few = config(name, **overrides, **{f"sample__{name}__num_timesteps": 3})
    message = rf"images decoded by DDIM .*sample\.{name}\.num_timesteps = 3 .*'eps'; take more"
    with pytest.raises(RunError, match=message):
        sample(few, tiny.copy(workdir, tmp_path))
    assert not (tmp_path / "samples" / f"{name}.npz").exists()


def test_guidance_is_shown_and_measured_at_every_scale(tmp_path):
    """Scale 1 is the conditional model, at one evaluation a step; 0 is the same for all classes."""
    conditional = {
        "model__class_conditional": True,
        "quality__features": "pixels",
        "quality__num_samples": 100,
        "sample__guidance__scales": (0.0, 1.0, 3.0),
        "sample__batch_size": 50,
    }
    tiny.untrained(tmp_path, tiny.config(**conditional), scale=0.3, step=3)
    sample(config("guidance", **conditional), tmp_path)
    assert (tmp_path / "samples" / "guidance.png").stat().st_size > 500
    rows = (tmp_path / "samples" / "guidance.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == [f"ancestral, scale {s}" for s in (0, 1, 3)]
    assert [row[2] for row in cells] == ["16", "8", "16"]
    assert len({row[3] for row in cells}) == 3


@pytest.mark.parametrize("name", edits.MASKS)
def test_masks_know_half_or_more(name):
    definition = define_model(tiny.config())
    mask = edits.known_part(config(sample__inpaint__known=name), definition)
    assert mask.shape == (8, 8, 1)
    assert mask.mean() == {"border": 0.75}.get(name, 0.5)


def test_a_mask_may_come_from_a_file(tmp_path):
    definition, path = define_model(tiny.config()), str(tmp_path / "mask.npy")
    mask = np.random.default_rng(0).random((8, 8)) < 0.5
    np.save(path, mask)
    found = edits.known_part(config(sample__inpaint__known=path), definition)
    np.testing.assert_array_equal(found[..., 0], mask)
    np.save(path, mask[:4])
    with pytest.raises(ConfigError, match=r"holds an array \(4, 8\); it must be \(8, 8\)"):
        edits.known_part(config(sample__inpaint__known=path), definition)


def test_what_cannot_be_made_is_named_and_nothing_is_written(workdir):
    before = tiny.files(workdir)
    for name, overrides, message in (
        ("inpaint", {"inpaint__known": "lefft"}, r"inpaint\.known .*'lefft' .*did you mean left"),
        ("inpaint", {"inpaint__known": "no.npy"}, r"inpaint\.known .*'no\.npy'"),
    ):
        with pytest.raises(ConfigError, match=message):
            sample(config(name, **{f"sample__{k}": v for k, v in overrides.items()}), workdir)
    assert tiny.files(workdir) == before
