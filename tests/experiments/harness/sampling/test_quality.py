"""Sample quality from a work directory: the reference, its cache, the sweep and its resumption."""

import json

import numpy as np
import pytest
from etils import epath
from sklearn.datasets import load_digits

from experiments import evaluate
from experiments.harness.data import splits
from experiments.harness.sampling import features, quality, sweep
from experiments.harness.sampling.draw import Drawer
from experiments.harness.setup.trained import load
from experiments.sample import sample
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def config(**overrides):
    tiny_quality = {
        "quality__num_samples": 100,
        "quality__classifier__num_steps": 60,
        "sample__batch_size": 100,
        "sample__sweep__samplers": ("ddim", "heun"),
        "sample__sweep__num_timesteps": (2, 3),
    }
    return tiny.config(**tiny_quality | overrides)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, quick_compiles):
    """An untrained model, and the trained classifier. Shared: copy it before writing to it."""
    workdir = tmp_path_factory.mktemp("quality")
    tiny.untrained(workdir, tiny.config(), scale=0.3, step=3)
    quality.reference(config(), workdir)
    return workdir


def test_the_reference_is_of_every_training_image(workdir):
    reference = quality.reference(config(), workdir)
    images = splits.load("digits", "train").images
    assert reference.moments.count == len(images) == len(reference.some)
    np.testing.assert_allclose(reference.moments.mean, reference.some.mean(axis=0), rtol=1e-9)
    expected = np.cov(reference.some, rowvar=False)
    np.testing.assert_allclose(reference.moments.covariance, expected, rtol=1e-7, atol=1e-9)
    # The scale that the kernel distance depends on.
    assert expected.trace() / len(expected) == pytest.approx(1, rel=1e-2)


def test_what_is_compared_stands_for_the_whole_split(workdir, tmp_path):
    """From anywhere in it, and not the first images: files are often sorted by class."""
    whole = quality.reference(config(), workdir)
    part = quality.reference(config(quality__max_pairs=200), tiny.copy(workdir, tmp_path))
    places = splits.some(200)(len(whole.some))
    assert places[-1] > 900
    np.testing.assert_array_equal(part.some, whole.some[places])


def test_the_classifiers_features_tell_digits_apart(workdir):
    """Nearest class means of the training images, on the test images, in its features."""
    reference = quality.reference(config(), workdir)
    target = load_digits().target
    train, test = target[:1000], target[1350:]
    means = np.stack([reference.some[train == k].mean(axis=0) for k in range(10)])
    images = splits.load("digits", "test").images
    found = np.concatenate(list(features.feature_batches(reference.features, images)))
    distance = np.square(found[:, None] - means).sum(axis=-1)
    assert (distance.argmin(axis=1) == test).mean() > 0.6  # by chance 0.1


def test_a_second_time_nothing_is_trained_or_measured(workdir, monkeypatch):
    first = quality.reference(config(), workdir)
    monkeypatch.setattr(features, "_train", None)
    monkeypatch.setattr(quality, "_measure", None)
    second = quality.reference(config(), workdir)
    assert second.features.name == first.features.name
    for one, other in zip(
        (*first.moments, first.some), (*second.moments, second.some), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_other_data_features_or_settings_are_another_reference(workdir, tmp_path):
    copy = tiny.copy(workdir, tmp_path)
    before = set((copy / "quality").iterdir())
    for overrides in (
        {"quality__features": "pixels"},
        {"quality__split": "test"},
        {"quality__max_pairs": 200},
        {"quality__classifier__seed": 1},
    ):
        quality.reference(config(**overrides), copy)
        now = set((copy / "quality").iterdir())
        assert now > before
        before = now


def test_data_are_closer_to_data_than_noise_is(workdir):
    """A half of the training set against the whole; uniform grey levels; the same image always."""
    reference = quality.reference(config(), workdir)
    images = splits.load("digits", "train").images
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 17, images.shape).astype(np.uint8)
    half, other = (quality.quality(config(), x, reference) for x in (images[::2], noise))
    same = quality.quality(config(), images[:1].repeat(200, axis=0), reference)
    assert half.frechet < 0.1 * other.frechet
    assert half.kernel < 0.1 * other.kernel
    assert half.precision == 1 > other.precision
    assert same.precision == 1
    assert same.recall < 0.1 < 0.9 < half.recall
    assert half.num_samples == 500


def test_every_image_is_featured_once(workdir):
    """The last batch is not whole: 1000 = 500 + 500, 447 < 500, and 501 = 500 + 1."""
    images = np.arange(501 * 64).reshape(501, 8, 8, 1) % 17
    pixels = features.pixels(config(), epath.Path(workdir))
    for n in (1, 499, 500, 501):
        found = np.concatenate(list(features.feature_batches(pixels, images[:n].astype(np.uint8))))
        np.testing.assert_allclose(found, images[:n].reshape(n, -1) / 16, rtol=1e-6)
        assert found.dtype == np.float64


def test_a_sweep_measures_every_entry_and_goes_on_where_it_was(workdir, tmp_path, monkeypatch):
    copy, draws = tiny.copy(workdir, tmp_path), []
    draw = Drawer.__call__

    def count(self, *args, **kwargs):
        draws.append(self.config.sample.sampler)
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(Drawer, "__call__", count)
    entries = sweep.sweep(load(config(), copy))
    assert draws == ["ancestral", "ddim", "ddim", "heun", "heun"]
    assert [(e.sampler, e.num_timesteps, e.evaluations) for e in entries] == [
        ("ancestral", 8, 8),
        ("ddim", 2, 2),
        ("ddim", 3, 3),
        ("heun", 2, 3),
        ("heun", 3, 5),
    ]
    samples = copy / "samples"
    told = json.loads((samples / "sweep.json").read_text())
    assert [sweep.Entry.from_dict(entry) for entry in told["entries"]] == entries
    assert (samples / "sweep.md").read_text().count("\n|") == 6
    assert (samples / "sweep.png").stat().st_size > 10_000
    assert len(list((samples / "sweep").glob("*.png"))) == 5
    # As if killed before the fourth: what was measured is kept, the rest is drawn.
    told["entries"] = told["entries"][:3]
    (samples / "sweep.json").write_text(json.dumps(told))
    draws.clear()
    assert sweep.sweep(load(config(), copy)) == entries
    assert draws == ["heun", "heun"]
    # Another seed's entries do not belong beside these.
    draws.clear()
    sweep.sweep(load(config(seed=1), copy))
    assert len(draws) == 5


def test_a_sweep_is_of_the_samples_that_sampling_draws(workdir, tmp_path):
    copy = tiny.copy(workdir, tmp_path)
    one = {"sample__sweep__samplers": ("ddim",), "sample__sweep__num_timesteps": (3,)}
    entry = sweep.sweep(load(config(**one), copy))[1]
    drawn = config(sample__sampler="ddim", sample__num_timesteps=3, sample__num_samples=100)
    images = sample(drawn, copy)
    reference = quality.reference(drawn, copy)
    assert quality.quality(drawn, images, reference) == entry.quality


def test_an_evaluation_tells_the_quality_of_what_sampling_draws(workdir, tmp_path):
    copy = tiny.copy(workdir, tmp_path)
    result = evaluate.evaluate(config(evaluate__also=("quality",)), copy)
    images = sample(config(sample__num_samples=100), copy)
    expected = quality.quality(config(), images, quality.reference(config(), copy))
    told = result["quality"]
    assert {name: told[name] for name in expected._fields} == expected._asdict()
    assert told["network_evaluations"] == 100 * 8
    last = evaluate.result_line(result).splitlines()[-1]
    assert last.startswith(f"  quality Fréchet distance {expected.frechet:.4f}")
    assert "100 samples by ancestral at 8 levels, 800 network evaluations" in last
