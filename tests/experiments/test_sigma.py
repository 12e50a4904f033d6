"""The bound by Σ_θ, and the errors that an analytic Σ_θ is worked out from."""

import json

import jax
import matplotlib.image
import numpy as np
import pytest

from diffusion.bound import kl_from_error
from diffusion.reverse import Reverse
from diffusion.schedules import Step
from diffusion.variances import from_measured_error
from experiments import sigma
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError
from experiments.harness.evaluation import paired, programs
from experiments.harness.evaluation.subject import subject_of
from experiments.harness.setup import analytic
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.trained import Run
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")

LEVELS = 5
LOG_SNR = np.linspace(8, -5, LEVELS)  # of the digits' schedule


def small_config(**overrides):
    """T = 4 and 8, and errors measured at five levels on all the 1000 training digits."""
    config = tiny.config(**overrides)
    config.sigma.update(num_timesteps=(4, 8), draws=2)
    config.analytic.update(levels=LEVELS, examples=1000)
    return config


def some_digits(config, split, n):
    dataset = splits.load_data(config, split)
    return dataset._replace(images=dataset.images[:n], labels=None)


def run_of(config, workdir, scale=1.0, step=1):
    """A run with random weights."""
    params = tiny.state_of(config, scale).ema_params
    return Run(config, workdir, define_model(config), params, step)


def measured(config, workdir, scale, step=1):
    return run_of(config, workdir, scale, step).measured_errors()


def zero_measured(config, workdir):
    """Errors of a network whose parameters, and so predictions, are zero."""
    run = run_of(config, workdir)
    return run._replace(params=jax.tree.map(np.zeros_like, run.params)).measured_errors()


def test_errors_of_a_prediction_that_x_0_is_zero_are_the_data(tmp_path):
    """ε − ε̂ = −(α/σ) (0 − x_0): no noise is left, and the error is SNR · mean x_0² per pixel."""
    log_snr, error = zero_measured(small_config(model__parameterization="x_0"), tmp_path)
    x_0 = splits.load("digits", "train").images.astype(np.float64) / 8 - 1
    assert len(x_0) == 1000
    expected = np.exp(LOG_SNR)[:, None, None, None] * (x_0**2).mean(axis=0)
    np.testing.assert_allclose(log_snr, LOG_SNR, rtol=1e-12)
    # Sums of 64 float32 numbers, at log-SNRs rounded to float32.
    np.testing.assert_allclose(error, expected, rtol=3e-6)


def test_errors_of_a_prediction_that_there_is_no_noise_are_chi_squared(tmp_path):
    """ε̂ = 0, so that the mean of n squares is χ²_n/n: mean 1, variance 2/n, all independent."""
    _, error = zero_measured(small_config(model__parameterization="eps"), tmp_path)
    n, values = 1000, error.ravel()
    assert abs(values.mean() - 1) < 4 * np.sqrt(2 / n / values.size)
    # The variance of a sample variance of near-normal numbers is 2/(size − 1) of its square.
    ratio = values.var(ddof=1) / (2 / n)
    assert abs(ratio - 1) < 4 * np.sqrt(2 / (values.size - 1))
    # Each level and each pixel has noise of its own.
    deviation = error.reshape(LEVELS, -1) - 1
    between_levels = np.corrcoef(deviation)[np.triu_indices(LEVELS, 1)]
    assert np.abs(between_levels).max() < 4 / np.sqrt(deviation.shape[1])


def test_batches_and_chunks_change_nothing(tmp_path):
    """70 examples, padded to 96 or to 128: each counts once, whatever it is padded with."""
    config = small_config()
    config.analytic.examples = 70
    config.evaluate.update(batch_size=32, chunk_size=2)
    _, once = measured(config, tmp_path, scale=1.0)
    (tmp_path / analytic.ERRORS_FILE).unlink()
    config.evaluate.update(batch_size=64, chunk_size=16)
    _, again = measured(config, tmp_path, scale=1.0)
    np.testing.assert_allclose(again, once, rtol=1e-5)


def test_errors_are_measured_once_for_a_checkpoint_and_anew_for_another(tmp_path):
    config = small_config()
    config.analytic.examples = 64
    log_snr, error = measured(config, tmp_path, scale=1.0)
    before = tiny.files(tmp_path)
    # Other parameters that claim to be the same step are not looked at.
    again = measured(config, tmp_path, scale=0.0)
    np.testing.assert_array_equal(again[0], log_snr)
    np.testing.assert_array_equal(again[1], error)
    # Neither T, nor Σ_θ, nor what an evaluation is of changes them.
    config.schedule.num_timesteps = 5
    config.model.variance = "beta"
    config.evaluate.split = "validation"
    measured(config, tmp_path, scale=0.0)
    assert tiny.files(tmp_path) == before
    _, second = measured(config, tmp_path, scale=0.0, step=2)
    assert not np.allclose(second, error, rtol=0.01)
    with np.load(tmp_path / analytic.ERRORS_FILE) as saved:
        assert saved["step"] == 2
        np.testing.assert_array_equal(saved["error"], second)


def test_errors_of_zero_make_beta_tilde(tmp_path, monkeypatch):
    """A pixel that is always predicted exactly has a point mass for its data."""
    config, shape = small_config(), (LEVELS, 8, 8, 1)
    monkeypatch.setattr(analytic, "measure_errors", lambda *_: (LOG_SNR, np.zeros(shape)))
    for name in analytic.ANALYTIC:
        chosen = run_of(config, tmp_path).with_variance(name)
        x = np.zeros((2, 8, 8, 1), np.float32)
        reverse = Reverse(None, "eps", chosen.definition.variance)
        step = Step(np.float32([3.0, -4.0]), np.float32([0.5, 2.0]))
        # log(1 + expm1(gap) e) at the least positive float32.
        assert np.all(np.abs(reverse.log_variance_ratio(step, x)) < 1e-36)


def test_an_empty_name_is_the_models_own(tmp_path):
    config = small_config(model__variance="beta")
    run = run_of(config, tmp_path)
    assert run.with_variance("") is run
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, quick_compiles):
    """A network of random weights with a learned Σ_θ, at step 3."""
    config = small_config(model__variance="learned_diagonal")
    return tiny.untrained(tmp_path_factory.mktemp("sigma"), config, scale=0.1, step=3)


@pytest.fixture(scope="module")
def first_run(workdir):
    """The entries of a run, and its files."""
    entries = sigma.sigma(small_config(model__variance="learned_diagonal"), workdir)
    return entries, tiny.files(workdir)


def totals_of(config, split, n, variances):
    """The totals of random weights, and the subject that they were measured on."""
    params, dataset = tiny.state_of(config, 0.1).ema_params, some_digits(config, split, n)
    subject = subject_of(config, define_model(config), params, dataset)
    choices = {
        (num_timesteps, name): paired.Choice(subject.schedule.levels(num_timesteps), variance)
        for num_timesteps in config.sigma.num_timesteps
        for name, variance in variances.items()
    }
    return paired.measure_totals(subject, choices, config.sigma.draws), subject


@pytest.mark.parametrize(
    ("of_model", "decoder"),
    [("beta_tilde", "discretized_gaussian"), ("learned_diagonal", "categorical")],
)
def test_an_entry_is_the_evaluation_with_that_variance_at_that_T(of_model, decoder):
    """Draw 0 is an evaluation's noise: example by example, only rounding sets them apart."""
    config = small_config(model__variance=of_model, decoder__name=decoder)
    log_snr, error = LOG_SNR, np.linspace(0.1, 0.9, LEVELS * 64).reshape(LEVELS, 8, 8, 1)
    variances = {
        of_model: define_model(config).variance,
        "analytic_diagonal": from_measured_error(log_snr, error),
    }
    totals, subject = totals_of(config, "test", 72, variances)
    for num_timesteps, name in ((4, of_model), (8, "analytic_diagonal")):
        definition = define_model(config)._replace(variance=variances[name])
        chosen = subject._replace(
            model=definition.model, levels=subject.schedule.levels(num_timesteps)
        )
        expected = programs.make_bound(chosen)(chosen, np.arange(72, dtype=np.int32)).total
        np.testing.assert_allclose(totals[num_timesteps, name][:, 0], expected, rtol=1e-5)


def test_the_draws_are_independent():
    """Paired errors vanish where Σ_θ is the same, and the draws differ where it is not."""
    config = small_config()
    own = define_model(config).variance
    totals, *_ = totals_of(config, "test", 64, {"beta_tilde": own, "again": own})
    at_8 = {key: total for key, total in totals.items() if key[0] == 8}
    entries = paired.summarize(at_8, "beta_tilde", num_dims=64)
    assert entries[1].difference == entries[1].difference_se == entries[1].difference_mc_se == 0
    assert entries[0].bits_per_dim_mc_se > 0
    # Of the two draws' means, each has twice the variance of their mean: √2 · √2 of its error.
    means = totals[8, "beta_tilde"].mean(axis=0) / (64 * np.log(2))
    assert abs(means[0] - means[1]) < 4 * 2 * entries[0].bits_per_dim_mc_se


def test_the_analytic_variances_are_the_best_on_their_own_errors(tmp_path):
    """Theorem 1 of Bao et al.: of all Σ that are a number for each level (and coordinate).

    At a level where the errors were measured, over the very examples and noise: the mean KL of a
    diagonal is no more than that of an isotropic one, nor this than β̃'s, β's or of any multiple of
    itself. The KL is linear in (ε − ε̂)², so that the mean error has the mean KL.
    """
    config = small_config()
    log_snr, error = measured(config, tmp_path, scale=0.1)
    step = Step(np.float32(log_snr), np.full(LEVELS, 0.7, np.float32))
    error32 = np.float32(error)

    def mean_kl(variance, shift=0.0):
        r = Reverse(None, "eps", variance).log_variance_ratio(step, error32)
        return np.asarray(kl_from_error(error32, step, r + shift), np.float64)

    isotropic = from_measured_error(log_snr, error.mean(axis=(1, 2, 3)))
    diagonal = from_measured_error(log_snr, error)
    assert np.all(mean_kl(diagonal) < mean_kl(isotropic))
    for fixed in ("beta_tilde", "beta"):
        assert np.all(mean_kl(isotropic) < mean_kl(fixed))
    for shift in (-0.1, 0.1):
        for best in (isotropic, diagonal):
            assert np.all(mean_kl(best) < mean_kl(best, shift))


def test_a_run_writes_its_table(workdir, first_run):
    entries, _ = first_run
    names = ["beta_tilde", "beta", "learned_diagonal", "analytic_isotropic", "analytic_diagonal"]
    assert [(e.num_timesteps, e.name) for e in entries] == [
        (T, name) for T in (4, 8) for name in names
    ]
    recorded = json.loads((workdir / "sigma.json").read_text())
    assert [row["variance"] for row in recorded["entries"]] == 2 * names
    assert [tuple(row.values()) for row in recorded["entries"]] == [tuple(e) for e in entries]
    told = {"split": "test", "step": 3, "seed": 0, "draws": 2, "num_examples": 447}
    assert {name: recorded[name] for name in told} == told
    for entry in entries:
        assert entry.bits_per_dim_se > 0
        assert entry.bits_per_dim_mc_se > 0
    table = (workdir / "sigma.md").read_text()
    assert "| Σ_θ | T = 4 | T = 8 |" in table
    for T in (4, 8):
        best = min((e for e in entries if e.num_timesteps == T), key=lambda e: e.bits_per_dim)
        assert f"**{best.bits_per_dim:.4f} ± {best.bits_per_dim_mc_se:.4f}**" in table
    assert table.count("**") == 4
    assert matplotlib.image.imread(workdir / "sigma.png").std() > 0


def test_a_second_run_gives_identical_files(workdir, first_run, tmp_path):
    _, files = first_run
    again = tiny.copy(workdir, tmp_path)
    (again / analytic.ERRORS_FILE).unlink()
    sigma.run(small_config(model__variance="learned_diagonal"), again)
    for name in ("sigma.json", "sigma.md", "sigma.png"):
        assert (again / name).read_bytes() == files[workdir / name][1], name
    before, after = np.load(workdir / "eps_errors.npz"), np.load(again / "eps_errors.npz")
    np.testing.assert_array_equal(after["error"], before["error"])


def test_a_schedule_without_so_many_levels_is_one_line():
    config = small_config(schedule__name="betas")
    config.schedule.betas.betas = (0.5,)
    config.schedule.num_timesteps = 1
    with pytest.raises(ConfigError, match=r"config.sigma.num_timesteps = \(4, 8\); .* no 4 levels"):
        sigma.check(config)
