"""Images to bytes and back with a tiny network: each Σ_θ, both orders, labels, and errors."""

import functools

import jax
import numpy as np
import pytest

from diffusion.coding import ORDERS
from experiments.harness.compression import codec, container, stack
from experiments.harness.compression.codec import Codec, compress, decompress
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.trained import Run
from tests.experiments import tiny

pytest.importorskip("constriction")
pytestmark = pytest.mark.usefixtures("quick_compiles")

IMAGES = splits.load("digits", "test").images[:5]
VARIANCES = ("beta_tilde", "beta", "learned_range", "learned_diagonal", "analytic_diagonal")


def run_of(workdir, scale=0.1, seed=0, **overrides):
    """A run with random weights, T = 4 and batches of 2."""
    config = tiny.config(**overrides)
    config.analytic.update(levels=5, examples=64)
    config.compress.update(num_timesteps=4, batch_size=2)
    definition = define_model(config)
    params = tiny.state_of(config, scale, seed).ema_params
    return Run(config, workdir, definition.learned(params), params, 1)


def with_settings(run, **settings):
    config = run.config.copy_and_resolve_references()
    config.compress.update(settings)
    return run._replace(config=config)


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_compiles):
    return run_of(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def content(run):
    return compress(run, IMAGES)


def test_images_come_back(run, content):
    """Of a last batch that is not full too; the file says how, whatever the settings are now."""
    other = with_settings(run, order="bb_ans", num_timesteps=9, bins_per_std=3.0, batch_size=4)
    np.testing.assert_array_equal(decompress(other, content), IMAGES)


def test_errors_that_were_measured_for_a_file_serve_its_decoder(tmp_path):
    """Whatever the settings of a measurement are by then; another one would take minutes."""
    content = compress(with_settings(run_of(tmp_path), variance="analytic_diagonal"), IMAGES)
    before = tiny.files(tmp_path)
    other = run_of(tmp_path)
    other.config.update_from_flattened_dict({"analytic.levels": 9, "seed": 7})
    np.testing.assert_array_equal(decompress(other, content), IMAGES)
    assert tiny.files(tmp_path) == before


@pytest.mark.parametrize("variance", VARIANCES)
def test_images_come_back_with_every_variance_in_both_orders(variance, tmp_path):
    is_measured = variance.startswith("analytic")
    run = run_of(tmp_path, **({} if is_measured else {"model__variance": variance}))
    for order in ORDERS:
        here = with_settings(run, order=order, variance=variance, verify=False)
        other = with_settings(run)
        other.config.analytic.update(levels=9, examples=8)  # the file's own count
        np.testing.assert_array_equal(decompress(other, compress(here, IMAGES)), IMAGES)


@pytest.mark.parametrize(
    "overrides",
    [
        {"schedule__name": "learned", "train__time": "continuous"},
        {"decoder__name": "discretized_gaussian", "compress__num_timesteps": 1},
        {"compress__spacing": "karras"},
    ],
    ids=["schedule", "decoder", "spacing"],
)
def test_images_come_back_with_other_parts(overrides, tmp_path):
    run = run_of(tmp_path, **overrides)
    run = with_settings(run, **{k[10:]: v for k, v in overrides.items() if "compress" in k})
    compress(run, IMAGES[:3])  # verifies itself


def test_labels_are_a_condition_that_the_file_holds(tmp_path):
    run = run_of(tmp_path, model__class_conditional=True)
    labels = np.array([3, 1, 4, 1, 5], np.int32)
    content = compress(run, IMAGES, labels)
    np.testing.assert_array_equal(decompress(run, content), IMAGES)
    np.testing.assert_array_equal(decompress(run, compress(run, IMAGES)), IMAGES)
    codec = Codec(run, True)
    without, other = (codec.encode(IMAGES, x, True).ledger.density for x in (labels, labels[::-1]))
    assert not np.allclose(without, other)


def test_the_stream_is_as_long_as_the_ledger_says(run):
    """Within the coder's own state and parts of words.

    With a Σ_θ as wide as the errors of this network, or far values would be cheaper than they are.
    """
    wide = with_settings(run, variance="analytic_diagonal")
    encoded = Codec(wide, False).encode(IMAGES, has_ledger=True)
    bits = 32 * (len(encoded.words) - encoded.num_initial)
    assert abs(bits - encoded.ledger.bins.sum() / np.log(2)) < 96
    grids = (encoded.ledger.bins - encoded.ledger.density) / np.log(2) / 64
    assert np.abs(grids).max() < 0.1


def test_every_evaluation_of_the_network_is_counted(run):
    """T for an image: T − 1 for the p(x_{t−1} | x_t), and one for p(x_0 | x_1)."""
    here = Codec(run, False)
    here.encode(IMAGES)
    assert here._programs.bar.n == here._programs.bar.total == 4 * len(IMAGES)
    assert min(here.seconds["network"], here.seconds["q"]) > 0


def changed(run):
    """The run with another value in its first weight."""
    params = jax.tree.map(np.array, run.params)
    jax.tree.leaves(params)[0].flat[0] += 1e-6
    return run._replace(params=params)


@pytest.mark.parametrize(
    ("images", "wrong"),
    [
        (IMAGES[:, :4], r"uint8 of shape \(5, 4, 8, 1\); this run compresses uint8 of"),
        (IMAGES.astype(np.int64), "the images are int64"),
        (IMAGES[:0], "with n ≥ 1"),
        (IMAGES + np.uint8(1), "the grey level 17; this run has the levels 0 to 16"),
    ],
)
def test_images_of_another_kind_are_one_line(run, images, wrong):
    with pytest.raises(ConfigError, match=wrong):
        compress(run, images)


def test_labels_for_a_model_without_classes_are_one_line(run):
    with pytest.raises(ConfigError, match="this run's model takes none"):
        compress(run, IMAGES, np.zeros(5, np.int32))


def repacked(content, **changes):
    """A file with another header and a right checksum."""
    header, words = container.unpack(content, "")
    return container.pack(header._replace(**changes), words)


def test_a_file_of_another_checkpoint_machine_or_program_is_one_line(run, content, monkeypatch):
    with pytest.raises(ConfigError, match=r"a.dlvm was compressed with weights '.* of step 1'"):
        decompress(changed(run), content, "a.dlvm")
    header, _ = container.unpack(content, "")
    for key in header.fingerprint:
        other = repacked(content, fingerprint=header.fingerprint | {key: "another"})
        with pytest.raises(ConfigError, match=f"was compressed with {key} 'another', and here it"):
            decompress(run, other)
    monkeypatch.setattr(stack, "constriction", None)
    for changes, wrong in (
        ({"shape": (4, 4, 1)}, r"holds images of shape \(4, 4, 1\) with 17 grey levels; this run"),
        ({"num_levels": 5}, r"with 5 grey levels; this run has \(8, 8, 1\) with 17"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            decompress(run, repacked(content, **changes))


def test_settings_of_a_file_are_checked(run, content):
    header, _ = container.unpack(content, "")
    for name, value in (("order", "other"), ("batch_size", 10**9), ("num_timesteps", None)):
        other = repacked(content, settings=header.settings | {f"compress.{name}": value})
        with pytest.raises(ConfigError, match=f"compress.{name}"):
            decompress(run, other)


def test_nothing_compiles_before_a_file_is_found_good(run, content, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(codec, "Codec", never)
    damaged = bytearray(content)
    damaged[-20] ^= 1
    with pytest.raises(ConfigError, match="its checksum differs"):
        decompress(run, bytes(damaged))
    with pytest.raises(ConfigError, match="weights"):
        decompress(changed(run), content)


def test_a_decoder_that_computes_something_else_is_noticed(run, content):
    """The checksum of the pixels, and the bits where the encoder began."""
    with pytest.raises(RunError, match="are not those that were compressed"):
        decompress(run, repacked(content, pixels="00"))
    with pytest.raises(RunError, match="are not those that were compressed"):
        decompress(run, repacked(content, seed=1))


def test_an_encoder_checks_its_own_file(run, monkeypatch):
    decode = Codec.decode

    @functools.wraps(decode)
    def wrong(self, *arguments):
        return decode(self, *arguments) ^ 1

    monkeypatch.setattr(Codec, "decode", wrong)
    with pytest.raises(RunError, match="are not those that were compressed"):
        compress(run, IMAGES)
    assert compress(with_settings(run, verify=False), IMAGES)


def test_a_grid_too_fine_is_one_line(run):
    fine = with_settings(run, num_timesteps=10**7, bins_per_std=64.0)
    with pytest.raises(ConfigError, match=r"config.compress.num_timesteps = 10000000: the grid of"):
        compress(fine, IMAGES)
