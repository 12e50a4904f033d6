"""Continuous data end to end: vectors and float images, whose bound is one on a density."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import base
from diffusion.exact import distributions
from experiments import compress, evaluate, sample, train
from experiments.harness.data import splits
from experiments.harness.data.sources.source import Source
from experiments.harness.errors import ConfigError
from experiments.harness.setup import definition
from experiments.harness.training import step
from experiments.notebook import load
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")

TRIANGLE = distributions.Mixture(
    np.array([0.5, 0.3, 0.2]),
    np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.2]]),
    np.stack([0.05 * np.eye(2)] * 3),
)
SIZES = {"train": 2000, "validation": 200, "test": 300}
POINTS = {
    name: np.asarray(TRIANGLE.sample(jax.random.key(i), n))
    for i, (name, n) in enumerate(SIZES.items())
}


class Mlp(nn.Module):
    out_channels: int

    def validate(self, image_shape):
        pass

    @nn.compact
    def __call__(self, x_t, log_snr, condition=None, train=False):
        angles = log_snr[:, None] * np.array([0.1, 0.3, 0.9])
        hidden = jnp.concatenate([x_t, jnp.sin(angles), jnp.cos(angles)], axis=1)
        for _ in range(3):
            hidden = nn.swish(nn.Dense(64)(hidden))
        return nn.Dense(self.out_channels)(hidden)


@pytest.fixture(scope="module")
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(splits.DATASETS, "triangle", lambda name: Source.of_array(POINTS[name]))
        mlp = lambda settings, schedule, out_channels, num_classes: Mlp(out_channels)  # noqa: E731
        patch.setitem(definition.MODELS, "mlp", mlp)
        yield


def vectors(**overrides):
    """The defaults, with a network for vectors on the mixture; steps of a millisecond."""
    config = base.get_config()
    config.data.name, config.model.name, config.schedule.name = "triangle", "mlp", "linear_log_snr"
    config.schedule.num_timesteps = 100
    config.model.parameterization, config.train.objective = "v", "vlb"
    config.train.update(
        num_steps=1000, batch_size=256, learning_rate=5e-3, decay="cosine", ema_decay=0.99
    )
    config.train.update(log_every=500, checkpoint_every=500, sample_every=1000, sample_timesteps=3)
    config.evaluate.update(also=("continuous",), max_evaluations=300_000)
    config.sample.update(num_samples=80, num_timesteps=20, strip_columns=3)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


@pytest.fixture(scope="module")
def trained(registered, tmp_path_factory):
    config, workdir = vectors(), tmp_path_factory.mktemp("vectors")
    train.train(config, workdir)
    return config, workdir


def test_the_bound_is_above_the_density_in_closed_form_and_close_to_it(trained):
    """At T = 100 the steps alone cost a nat; as T → ∞ only the error of the network is left."""
    config, workdir = trained
    result = evaluate.evaluate(config, workdir)
    assert "uniform_bits_per_dim" not in result
    assert "warning" not in evaluate.result_line(result)
    bound, minus_log_p = load(workdir).bound(), -np.asarray(TRIANGLE.log_prob(POINTS["test"]))
    assert bound.bits_per_dim == result["bits_per_dim"]
    gap = bound.terms.total - minus_log_p
    assert gap.mean() > 4 * np.hypot(gap.std(ddof=1) / np.sqrt(len(gap)), bound.nats.mc_se)
    limit, se = result["continuous"]["bits_per_dim"], result["continuous"]["bits_per_dim_mc_se"]
    excess = limit - minus_log_p.mean() / (2 * np.log(2))
    assert se < 0.02
    assert -4 * se < excess < 0.15
    assert limit + 4 * se < bound.bits_per_dim
    # From p(x_1), which has more entropy than p(x_0), the decoder's narrow density subtracts.
    assert result["reconstruction"] < 0 < result["diffusion"]


def test_vectors_are_sampled_and_drawn_as_points(trained):
    config, workdir = trained
    samples = sample.sample(config, workdir)
    assert (samples.shape, samples.dtype) == ((80, 2), np.float32)
    with np.load(workdir / "samples" / "samples.npz") as saved:
        np.testing.assert_array_equal(saved["samples"], samples)
    # Of the three components' probabilities; six standard errors.
    nearest = np.linalg.norm(samples[:, None] - TRIANGLE.means, axis=2).argmin(axis=1)
    shares = np.bincount(nearest, minlength=3) / len(samples)
    np.testing.assert_allclose(shares, TRIANGLE.weights, atol=6 * np.sqrt(0.25 / len(samples)))
    np.testing.assert_array_equal(load(workdir).sample(80), samples)
    widths = {
        name: Image.open(workdir / "samples" / f"{name}.png").width
        for name in ("samples", "reverse", "forward", "step_00001000")
    }
    assert widths["reverse"] == widths["forward"] == 4 * widths["samples"]
    assert json.loads((workdir / "data.json").read_text())["image_shape"] == [2]


def test_a_run_is_resumed_and_its_data_are_recognised(trained, tmp_path, monkeypatch):
    config, workdir = trained
    copied = tiny.copy(workdir, tmp_path)
    assert int(train.train(config, copied).step) == 1000
    other = {**POINTS, "train": POINTS["train"] + 1}
    monkeypatch.setitem(splits.DATASETS, "triangle", lambda name: Source.of_array(other[name]))
    with pytest.raises(ConfigError, match=r"other training images: .* fingerprint"):
        train.train(config, copied)


REFUSED = [
    (train, {"data__flip": True}, "data.flip = True, but the data are no images"),
    (train, {"model__name": "unet"}, r"model.name = 'unet'; it is for images, .* \(2,\)"),
    (sample, {"sample__also": ("encode",)}, "the data are no images"),
    (evaluate, {"evaluate__also": ("quality",)}, "needs grey levels"),
    (
        evaluate,
        {"evaluate__also": ("ode",), "evaluate__ode__dequantization": "uniform"},
        r"evaluate.ode.dequantization = 'uniform' needs grey levels.*use noise",
    ),
    (compress, {}, "data.name = 'triangle' needs grey levels"),
]


@pytest.mark.parametrize(("experiment", "overrides", "message"), REFUSED)
def test_what_makes_no_sense_is_one_line(registered, experiment, overrides, message):
    with pytest.raises(ConfigError, match=message) as raised:
        experiment.check(vectors(**overrides))
    assert "\n" not in str(raised.value)


def test_the_decoder_of_grey_levels_says_nothing_of_continuous_data(registered):
    """In continuous time DDPM's depends on T; continuous data don't have it."""
    config = vectors(train__time="continuous")
    train.check(config)
    digits = tiny.config(train__time="continuous", decoder__name="discretized_gaussian")
    with pytest.raises(ConfigError, match=r"decoder\.discretized_gaussian.*depends on T"):
        step.check(digits, definition.define_model(digits))


def test_images_of_floats_are_streamed_sampled_and_drawn(tmp_path, monkeypatch):
    images = np.random.default_rng(0).normal(0, 0.3, (64, 8, 8, 1)).astype(np.float32)

    def source(split):
        return Source.of_array(images)._replace(get=lambda place: (images[place], None))

    monkeypatch.setitem(splits.DATASETS, "noise", source)
    config = tiny.config(
        data__name="noise", data__stream="always", data__workers=0, train__num_steps=2,
        train__checkpoint_every=2, train__sample_every=2,
    )  # fmt: skip
    train.train(config, tmp_path)
    samples = sample.sample(config, tmp_path)
    assert (samples.shape, samples.dtype) == ((6, 8, 8, 1), np.float32)
    assert Image.open(tmp_path / "samples" / "samples.png").mode == "L"
    some = splits.load_data(config, "train", splits.some(5)).images
    assert some.dtype == np.float32
    assert {image.tobytes() for image in some} <= {image.tobytes() for image in images}


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((0, 2)), None, r"\(0, 2\); it must be"),
        (np.zeros(3), None, r"\(3,\); it must be"),
        (np.zeros((3, 2), np.uint8), None, "uint8"),
        (np.zeros((3, 2), np.int32), None, "int32"),
        (np.full((3, 2), np.nan), None, "not finite"),
        (np.zeros((3, 2)), [1, 2, 2], "labels start at 1"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(images, labels, message):
    with pytest.raises(ConfigError, match=message):
        Source.of_array(images, labels)


def test_a_source_that_misstates_its_shape_is_refused(monkeypatch):
    wrong = Source.of_array(np.zeros((3, 2)))._replace(image_shape=(3,))
    monkeypatch.setitem(splits.DATASETS, "wrong", lambda split: wrong)
    with pytest.raises(ConfigError, match=r"shape \(2,\), and its source says \(3,\)"):
        splits.load("wrong", "train")
