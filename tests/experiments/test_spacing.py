"""The bound by spacing: the best levels, kept for samplers, and every spacing measured."""

import itertools
import json

import matplotlib.image
import numpy as np
import pytest

from diffusion.bound import kl_from_error
from diffusion.reverse import Reverse
from diffusion.schedules import Levels, Step, linear_log_snr
from diffusion.spacing import SPACINGS
from diffusion.variances import VARIANCES, from_measured_error
from experiments import spacing
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError
from experiments.harness.evaluation import paired
from experiments.harness.evaluation.subject import subject_of
from experiments.harness.setup import optimal_steps
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.trained import Run
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")

LINE = linear_log_snr(8.0, -5.0)  # of the digits
NAMES = [*SPACINGS, "bound_optimal"]


def small_config(**overrides):
    """Three and six of 41 candidates, with errors measured at nine levels on 128 digits."""
    config = tiny.config(**overrides)
    config.spacing.update(num_timesteps=(3, 6), candidates=41)
    config.analytic.update(levels=9, examples=128)
    return config


def test_errors_that_are_the_same_everywhere_take_equal_gaps():
    """A step costs d/2 · e (exp(gap) − 1) with Σ_θ = β̃, and with the best Σ_θ d/2 times the
    logarithm of 1 + e (exp(gap) − 1): both are convex in the gap."""
    log_snr, error = np.array([8.0, 1.0, -5.0]), np.full((3, 2), 0.4)
    for sigma in (VARIANCES["beta_tilde"](), from_measured_error(log_snr, error)):
        found = optimal_steps.find(LINE.levels(41), log_snr, error, sigma, (3, 6))
        for n, levels in found.items():
            np.testing.assert_allclose(levels.log_snr, LINE.levels(n).log_snr, rtol=1e-12)


def test_errors_of_zero_have_levels():
    """A pixel that is always predicted exactly costs nothing, whatever the levels."""
    log_snr, error = np.array([8.0, -5.0]), np.zeros((2, 3))
    for name in ("beta_tilde", "beta"):
        found = optimal_steps.find(LINE.levels(9), log_snr, error, VARIANCES[name](), (4,))
        assert found[4].num_timesteps == 4


def test_on_the_training_data_the_best_levels_have_the_lowest_bounds(tmp_path):
    """Candidates that are the measured levels: up to Monte-Carlo error, no subset is better.

    The prior and the reconstruction are the same for all subsets, up to noise.
    """
    config = small_config(decoder__name="categorical")
    config.analytic.update(levels=9, examples=256)
    definition, params = define_model(config), tiny.state_of(config, 0.1).ema_params
    run = Run(config, tmp_path, definition, params, 1).with_variance("analytic_diagonal")
    definition, measured = run.definition, run.measured_errors()
    candidates = definition.schedule.levels(9)
    best = optimal_steps.find(candidates, *measured, definition.variance, (4,))[4]
    choices = {(4, "best"): paired.Choice(best, definition.variance)}
    for inner in list(itertools.combinations(range(1, 8), 2))[::4]:
        levels = Levels.from_log_snr(candidates.log_snr[1:][[0, *inner, 8]])
        choices[4, f"with {inner}"] = paired.Choice(levels, definition.variance)
    dataset = splits.load_data(config, "train", splits.first(256))
    subject = subject_of(config, definition, params, dataset)
    totals = paired.measure_totals(subject, choices, 2)
    others = paired.summarize(totals, "best", 64)[1:]
    for entry in others:
        assert entry.difference >= -4 * entry.difference_mc_se
    # Nor are all of them as good.
    assert max(entry.difference - 4 * entry.difference_mc_se for entry in others) > 0


def test_the_expected_bound_is_that_of_interpolated_errors():
    """The steps' costs sum to the KLs of errors that are log-linear in λ between measured ones."""
    measured, error = np.array([8.0, 1.0, -5.0]), np.array([[0.9, 0.5], [0.2, 0.4], [0.1, 0.01]])
    sigma = from_measured_error(measured, error)
    found = optimal_steps.find(LINE.levels(14), measured, error, sigma, (5, 14))

    def expected(levels):
        at = levels.log_snr[2:]
        of = np.stack([np.interp(-at, -measured, np.log(e)) for e in error.T], axis=1)
        step = Step(np.float32(at), np.float32(levels.gap[2:]))
        ratio = Reverse(None, "eps", sigma).log_variance_ratio(step, np.float32(of))
        return float(kl_from_error(np.float32(np.exp(of)), step, ratio).sum())

    # All 14 candidates lie between 8 and −5, one apart: another five cost more.
    for rule in SPACINGS.values():
        near = np.round(rule(LINE, 5).log_snr[1:])
        if len(set(near)) == 5:
            assert expected(found[5]) <= expected(Levels.from_log_snr(near)) * (1 + 1e-6)
    np.testing.assert_array_equal(found[14].log_snr, LINE.levels(14).log_snr)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, quick_compiles):
    """A network of random weights with a learned Σ_θ, at step 3."""
    config = small_config(model__variance="learned_diagonal")
    return tiny.untrained(tmp_path_factory.mktemp("spacing"), config, scale=0.1, step=3)


@pytest.fixture(scope="module")
def entries(workdir):
    return spacing.spacing(small_config(model__variance="learned_diagonal"), workdir)


def test_a_run_writes_its_table(workdir, entries):
    assert [(e.num_timesteps, e.name) for e in entries] == [(T, n) for T in (3, 6) for n in NAMES]
    recorded = json.loads((workdir / "spacing.json").read_text())
    assert [row["spacing"] for row in recorded["entries"]] == 2 * NAMES
    assert [tuple(row.values()) for row in recorded["entries"]] == [tuple(e) for e in entries]
    told = {
        "split": "test",
        "checkpoint": "best",
        "step": 3,
        "seed": 0,
        "variance": "learned_diagonal",
        "candidates": 41,
        "draws": 2,
        "num_examples": 447,
    }
    assert {name: recorded[name] for name in told} == told
    table = (workdir / "spacing.md").read_text()
    assert "| spacing | T = 3 | T = 6 |" in table
    assert "Difference to uniform" in table
    assert matplotlib.image.imread(workdir / "spacing.png").std() > 0


def test_equal_levels_differ_by_nothing(entries):
    """On a line in log-SNR equal gaps are uniform time: the pairing leaves only rounding."""
    for entry in entries:
        if entry.name in ("uniform", "log_snr"):
            assert abs(entry.difference) < 1e-5 * entry.bits_per_dim
            assert entry.difference_se < 1e-5 * entry.bits_per_dim
        assert entry.bits_per_dim_mc_se > 0


@pytest.mark.usefixtures("entries")
def test_levels_come_back_to_the_last_bit(workdir):
    """Those that were found are a part of the candidates, whose numbers are no short decimals."""
    candidates = LINE.levels(41).log_snr
    for num_timesteps in (3, 6):
        levels = optimal_steps.optimal_levels(workdir, num_timesteps, 3, LINE)
        assert levels.num_timesteps == num_timesteps
        assert set(levels.log_snr) <= set(candidates)
        assert (levels.log_snr[1], levels.log_snr[-1]) == (8.0, -5.0)


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize(
    ("num_timesteps", "step", "schedule", "wrong"),
    [
        (4, 3, LINE, "holds 3, 6 levels, and not 4"),
        (6, 5, LINE, "is of step 3, and the checkpoint of step 5"),
        (6, 3, linear_log_snr(9.0, -5.0), "is of another schedule, from λ = 8 to -5"),
    ],
)
def test_levels_of_something_else_are_one_line(num_timesteps, step, schedule, wrong, workdir):
    with tiny.refused(
        wrong,
        f"python main.py --experiment=spacing --workdir={workdir} ",
        f"'--config.spacing.num_timesteps=({num_timesteps},)'",
        match="^config.sample.spacing = 'bound_optimal': ",
    ):
        optimal_steps.optimal_levels(workdir, num_timesteps, step, schedule)


def test_levels_that_nobody_found_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no .*spacing.json; run first python main.py"):
        optimal_steps.optimal_levels(tmp_path, 6, 3, LINE)


def test_a_schedule_without_so_many_levels_is_one_line():
    config = small_config(schedule__name="betas", schedule__num_timesteps=1)
    config.schedule.betas.betas = (0.5,)
    setting = r"config.spacing.num_timesteps = \(3, 6\); .* no 3 levels"
    with pytest.raises(ConfigError, match=setting):
        spacing.check(config)
