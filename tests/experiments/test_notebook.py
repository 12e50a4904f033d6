"""A trained run in a notebook: the experiments' own numbers, and nothing written."""

import json

import jax
import numpy as np
import pytest

from diffusion import decoders
from diffusion.bound import Bound
from diffusion.exact import distributions
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from diffusion.schedules import alpha, linear_log_snr
from diffusion.variances import VARIANCES
from experiments import notebook
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError
from experiments.notebook import load
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")

SMALL = {"analytic.examples": 64, "analytic.levels": 3}


def test_a_notebook_measures_and_samples_as_the_experiments_do(finished):
    before = tiny.files(finished.workdir)
    run = load(finished.workdir)
    bound = run.bound("test")
    result = json.loads((finished.workdir / "evaluation.json").read_text())
    for name in bound._fields[1:7]:
        assert getattr(bound, name) == result[name]
    assert (run.step, len(bound.terms.kl)) == (result["step"], result["num_examples"])
    text = str(bound)
    assert text == repr(bound)
    assert text.startswith(f"test: {bound.bits_per_dim:.4f} bits/dim ± {bound.bits_per_dim_se:.4f}")
    with np.load(finished.workdir / "samples" / "samples.npz") as saved:
        np.testing.assert_array_equal(run.sample(6), saved["samples"])
    assert tiny.files(finished.workdir) == before


def test_a_run_is_measured_with_another_variance_and_other_settings(finished, monkeypatch):
    before = tiny.files(finished.workdir)
    run = load(finished.workdir, "latest", **{"schedule.num_timesteps": 4}, **SMALL)
    own = run.bound("validation", num_examples=20)
    assert own.terms.kl.shape == (20, 3)
    analytic = run.with_variance("analytic_diagonal").bound("validation", num_examples=20)
    np.testing.assert_array_equal(analytic.terms.prior, own.terms.prior)
    assert (analytic.terms.kl != own.terms.kl).all()
    # A function of one's own, by one line in the registry.
    mine = VARIANCES["beta"]()
    monkeypatch.setitem(VARIANCES, "mine", lambda: mine)
    assert run.with_variance("mine").definition.variance is mine
    assert run.sample(2, num_timesteps=2).shape == (2, 8, 8, 1)
    assert tiny.files(finished.workdir) == before


def test_few_examples_are_not_padded_to_a_batch_and_have_a_T_of_their_own(finished, monkeypatch):
    """Noise is a function of (seed, example, t): `test_full_bound` shows that batches are equal."""
    run, subjects = load(finished.workdir), []

    def measure(subject, replicates):
        subjects.append(subject)
        n, num_timesteps = subject.num_examples, subject.levels.num_timesteps
        kl, eps_error = np.zeros((n, num_timesteps - 1)), np.zeros((n, num_timesteps))
        return Bound(np.zeros(n), kl, np.zeros(n), eps_error), np.zeros(n)

    monkeypatch.setattr(notebook, "full_bound", measure)
    assert run.bound("validation", 3, num_timesteps=5).terms.kl.shape == (3, 4)
    assert run.bound("validation", 100).terms.kl.shape == (100, 7)
    devices = jax.device_count()
    assert [s.batch_size for s in subjects] == [-(-3 // devices) * devices, 64]
    with pytest.raises(ConfigError, match="num_timesteps = 0; a schedule needs at least 1"):
        run.bound("validation", 3, num_timesteps=0)


def test_any_model_is_measured_as_a_run_is(finished):
    """Of the same model, examples and seed: the same numbers; and in nats beside bits/dim."""
    run = load(finished.workdir)
    expected = run.bound("validation", num_examples=70)
    data = splits.load_data(run.config, "validation", splits.first(70))
    x_0 = run.definition.quantization.to_data(data.images)
    bound = notebook.measure(run.model(), x_0, run.config.seed)
    for name in set(bound._fields[1:7]) - {"bits_per_dim_mc_se"}:
        np.testing.assert_allclose(getattr(bound, name), getattr(expected, name), rtol=1e-6)
    # That error is estimated here from other replicates.
    np.testing.assert_allclose(bound.bits_per_dim_mc_se, expected.bits_per_dim_mc_se, rtol=0.3)
    assert bound.num_dims == 64
    assert str(bound).startswith("bound: ")
    np.testing.assert_allclose(bound.nats.mean, bound.terms.total.mean(), rtol=1e-9)
    np.testing.assert_allclose(
        bound.nats.se, bound.terms.total.std(ddof=1) / np.sqrt(70), rtol=1e-9
    )
    other = notebook.measure(run.model(), x_0, run.config.seed + 1, batch_size=32, chunk_size=3)
    difference = other.bits_per_dim - bound.bits_per_dim
    assert 0 < abs(difference) < 4 * np.hypot(bound.bits_per_dim_mc_se, other.bits_per_dim_mc_se)


CLASSES = distributions.normal(np.zeros(2), np.eye(2))


def denoiser_of_a_shift(x_t, log_snr, condition):
    """E[x_0 | x_t] of N(shift, I), where the shift is the condition."""
    return condition + CLASSES.denoiser(x_t - alpha(log_snr)[:, None] * condition, log_snr)


def test_each_example_is_measured_given_its_own_condition():
    """With the shift known, the bound of x_0 is that of x_0 − shift, but for the prior."""
    shift = np.random.default_rng(0).normal(size=(70, 2)).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=(70, 2)).astype(np.float32)
    levels = linear_log_snr(6.0, -6.0).levels(5)
    model = DiffusionModel(Reverse(denoiser_of_a_shift, "x_0"), decoders.gaussian(), levels)
    with_shift = notebook.measure(model.given(shift), noise + shift).terms
    without = notebook.measure(model.given(0 * shift), noise).terms
    np.testing.assert_allclose(with_shift.kl, without.kl, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(with_shift.reconstruction, without.reconstruction, atol=1e-3)
    with pytest.raises(ValueError, match=r"condition is \(70, 2\).* each of the 3 examples"):
        notebook.measure(model.given(shift), noise[:3])


def test_examples_that_are_no_data_are_refused():
    model = DiffusionModel(
        Reverse(lambda x_t, log_snr, condition=None: x_t, "x_0"),
        decoders.categorical(decoders.Quantization(17)),
        linear_log_snr().levels(4),
    )
    with pytest.raises(ValueError, match=r"uint8 .*convert grey levels"):
        notebook.measure(model, np.zeros((3, 2), np.uint8))
    with pytest.raises(ValueError, match="at least one example"):
        notebook.measure(model, np.zeros((0, 2)))
    with pytest.raises(ValueError, match=r"0\.1, which is no grey level"):
        notebook.measure(model, np.full((3, 2), 0.1, np.float32))


def test_what_cannot_be_loaded_is_named(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.json; train first"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="batch_siz"):
        load(finished.workdir, **{"evaluate.batch_siz": 3})
    with pytest.raises(ConfigError, match=r"model\.parameterization was 'v', now 'eps'"):
        load(finished.workdir, **{"model.parameterization": "eps"})
    with pytest.raises(ConfigError, match="'tset'"):
        load(finished.workdir).bound("tset")
    copied = tiny.copy(finished.workdir, tmp_path)
    settings = json.loads((copied / "config.json").read_text())
    settings["train"]["lr"] = 0.1
    (copied / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"it has train\.lr = 0\.1, unknown to this one;"):
        load(copied)
