"""A trained run in a notebook: the experiments' own numbers, and nothing written."""

import json

import jax
import numpy as np
import pytest

from diffusion.bound import Bound
from diffusion.variances import VARIANCES
from experiments import notebook
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
    for name in bound._fields[1:-1]:
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
