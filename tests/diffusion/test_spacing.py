"""Which levels a bound or a sampler steps through: by rule, and the best ones."""

import itertools

import numpy as np
import pytest

from diffusion import bound, schedules, spacing, variances
from diffusion.schedules import Schedule, Step
from tests.diffusion import oracles, problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

LINE = schedules.linear_log_snr(9.0, -6.0)
TABLE = schedules.linear_beta(200)
V = np.array([4.0, 1.0, 0.25, 0.01])  # the variances of `problems.testbed`


def optimal_error(log_snr):
    """E(ε − ε̂)² = v SNR/(1 + v SNR) of each coordinate of the testbed, [n, 4]."""
    return 1 / (1 + np.exp(-np.asarray(log_snr))[:, None] / V)


def gaussian_costs(num_levels, variance=None):
    """The candidates of LINE and their costs for the testbed; Σ_θ = β̃ by default."""
    log_snr = LINE.levels(num_levels).log_snr[1:]
    variance = variance or variances.beta_tilde()
    return log_snr, spacing.pair_costs(log_snr, optimal_error(log_snr), variance)


def total(cost, indices):
    return cost[indices[:-1], indices[1:]].sum()


@pytest.mark.parametrize("name", spacing.SPACINGS)
@pytest.mark.parametrize("schedule", [LINE, TABLE, schedules.cosine(50)], ids=["line", "β", "cos"])
def test_every_spacing_joins_the_ends_of_the_schedule(name, schedule):
    of = spacing.SPACINGS[name]
    for num_timesteps in (2, 3, 10, 1000):
        levels = of(schedule, num_timesteps)
        assert levels.num_timesteps == num_timesteps
        assert levels.log_snr[1] == schedule.knots[0]
        assert levels.log_snr[-1] == schedule.knots[-1]
    np.testing.assert_array_equal(of(schedule, 1).log_snr, [np.inf, schedule.knots[-1]])
    with pytest.raises(ValueError, match="num_timesteps = 0"):
        of(schedule, 0)


@pytest.mark.parametrize("name", spacing.SPACINGS)
def test_a_million_levels_still_differ(name):
    levels = spacing.SPACINGS[name](schedules.linear_log_snr(20.0, -20.0), 10**6)
    assert levels.gap[2:].min() > 0


@pytest.mark.parametrize("name", spacing.SPACINGS)
def test_a_schedule_of_one_level_has_no_two(name):
    with pytest.raises(ValueError, match="fall strictly"):
        spacing.SPACINGS[name](schedules.from_betas([0.5]), 3)


def test_quadratic_times_on_a_line_have_gaps_in_arithmetic_progression():
    """Squares differ by odd numbers: the gaps are 1, 3, 5, … of (K − 1)² parts of the range."""
    gap = spacing.quadratic(LINE, 11).gap[2:]
    np.testing.assert_allclose(gap, 15.0 / 100 * np.arange(1, 20, 2), rtol=1e-12)


def test_quadratic_times_that_are_knots_of_a_table_take_its_levels():
    """Of 10 knots K = 4 takes numbers 0, 1, 4 and 9."""
    knots = np.cumsum(-np.random.default_rng(0).random(10) - 0.1)
    levels = spacing.quadratic(Schedule(knots), 4)
    np.testing.assert_allclose(levels.log_snr[1:], knots[[0, 1, 4, 9]], rtol=1e-14)


def test_equal_gaps_in_log_snr_know_nothing_of_the_schedules_time():
    levels = spacing.log_snr(TABLE, 12)
    line = schedules.linear_log_snr(TABLE.knots[0], TABLE.knots[-1])
    # Positions on a line are rounded otherwise.
    np.testing.assert_allclose(levels.log_snr[1:], line.levels(12).log_snr[1:], atol=1e-13)
    np.testing.assert_allclose(np.diff(levels.gap[2:]), 0, atol=1e-13)


@pytest.mark.parametrize("rho", [1.0, 7.0, 30.0])
def test_karras_is_equation_5(rho):
    """σ_i = (σ_max^{1/ρ} + i/(N − 1) (σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ from noise to data."""
    sigma = np.exp(-0.5 * spacing.karras(LINE, 18, rho).log_snr[1:])[::-1]
    low, high, i = np.exp(-4.5) ** (1 / rho), np.exp(3.0) ** (1 / rho), np.arange(18)
    np.testing.assert_allclose(sigma, (high + i / 17 * (low - high)) ** rho, rtol=1e-12)


def test_karras_of_a_large_rho_has_equal_gaps_in_log_snr():
    """The difference is of order range²/ρ: ρ log of a mean against the mean of logs."""
    levels, limit = spacing.karras(LINE, 20, 1e6), spacing.log_snr(LINE, 20)
    np.testing.assert_allclose(levels.log_snr[1:], limit.log_snr[1:], atol=15.0**2 / 1e6)


@pytest.mark.parametrize("rho", [0.0, -7.0, float("nan"), 1e-3])
def test_karras_needs_a_rho_that_has_levels(rho):
    with pytest.raises(ValueError, match=r"rho = .* positive|finite log-SNRs"):
        spacing.karras(LINE, 10, rho)


def test_levels_that_float32_cannot_tell_apart_are_refused():
    """At ρ = 0.03 the last steps are 2ρ/K = 6e-7 long; float32 near 20 has a spacing of 2e-6."""
    line = schedules.linear_log_snr(20.0, -20.0)
    assert spacing.karras(line, 10**4, 0.03).num_timesteps == 10**4
    with pytest.raises(ValueError, match=r"rho = 0.03 with .* 100000; .* equal in float32"):
        spacing.karras(line, 10**5, 0.03)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("of", ["beta_tilde", "beta", "isotropic", "diagonal"])
def test_the_cost_of_a_step_is_its_mean_kl(of):
    """Against the bound's own term at sigma points of (x_0, ε), in which the KL is quadratic."""
    log_snr = np.array([7.0, 3.0, 2.9, -1.0, -5.0])
    wrong = 1.3 * optimal_error(log_snr)  # a Σ_θ need not be the best one
    sigma = {
        "beta_tilde": variances.beta_tilde,
        "beta": variances.beta,
        "isotropic": lambda: variances.from_measured_error(log_snr, wrong.mean(axis=1)),
        "diagonal": lambda: variances.from_measured_error(log_snr, wrong),
    }[of]()
    cost = spacing.pair_costs(log_snr, optimal_error(log_snr), sigma)
    model = problems.predicting(problems.testbed(), "v", sigma)
    x_0, eps = np.split(oracles.sigma_points(8), 2, axis=1)
    for s, t in itertools.combinations(range(len(log_snr)), 2):
        step = Step(np.full(16, log_snr[t]), np.full(16, log_snr[s] - log_snr[t]))
        expected = bound.step_terms(model, x_0 * np.sqrt(V), eps, step).kl.mean()
        # The testbed's covariance is float32's nearest to 1/100 and the rest exact.
        np.testing.assert_allclose(cost[s, t], expected, rtol=1e-7)


@pytest.mark.parametrize(("v", "of"), [(3.0, "own errors"), (1.0, "own errors"), (1.0, "beta")])
def test_steps_through_a_normal_with_the_right_variance_cost_its_information(v, of):
    """p_θ is q then, and costs are the differences of I(x_0; x_t) = ½ log(1 + v SNR): additive.

    Σ_θ = β is right where the data are standard normal.
    """
    log_snr = LINE.levels(30).log_snr[1:]
    error = 1 / (1 + np.exp(-log_snr) / v)
    sigma = variances.beta()
    if of == "own errors":
        sigma = variances.from_measured_error(log_snr, error)
    cost = spacing.pair_costs(log_snr, error[:, None], sigma)
    information = 0.5 * np.log1p(v * np.exp(log_snr))
    s, t = np.triu_indices(30, 1)
    # Σ_θ holds its table of errors in float32.
    np.testing.assert_allclose(cost[s, t], (information[:, None] - information)[s, t], rtol=2e-5)
    assert np.all(np.isinf(cost[t, s]))
    assert np.all(np.isinf(np.diag(cost)))


def test_steps_of_any_size_cost_a_number():
    for sigma in (
        variances.beta_tilde(),
        variances.beta(),
        variances.from_measured_error(np.array([20.0, -20.0]), np.array([0.9, 1e-38])),
    ):
        log_snr = schedules.linear_log_snr(20.0, -20.0).levels(9).log_snr[1:]
        cost = spacing.pair_costs(log_snr, np.full((9, 2), 0.5), sigma)
        assert np.all(np.isfinite(cost[np.triu_indices(9, 1)]))
        assert np.all(cost > 0)
        far = spacing.pair_costs(np.array([3e3, 0.0, -3e3]), np.full((3, 2), 0.5), sigma)
        assert not np.isnan(far).any()


def test_costs_of_what_has_none_are_an_error():
    log_snr, error = np.array([1.0, 0.0]), np.ones((2, 3))
    with pytest.raises(ValueError, match="learned"):
        spacing.pair_costs(log_snr, error, variances.learned_diagonal())
    with pytest.raises(ValueError, match="must decrease"):
        spacing.pair_costs(log_snr[::-1], error, variances.beta())


@pytest.mark.parametrize("kind", ["uniform", "signed", "mostly infinite", "convex"])
def test_the_best_levels_are_those_of_all_subsets(kind):
    rng = np.random.default_rng(3)
    n = 8
    for _ in range(5):
        cost = rng.random((n, n))
        if kind == "signed":
            cost = rng.standard_normal((n, n))
        elif kind == "mostly infinite":
            cost = np.where(rng.random((n, n)) < 0.7, np.inf, cost)
        elif kind == "convex":
            place = np.sort(rng.random(n))
            cost = (place[None] - place[:, None]) ** 2
        found = spacing.bound_optimal(cost, n)
        assert sorted(found) == list(range(1, n + 1))
        for k in range(2, n + 1):
            indices = found[k]
            assert len(indices) == k
            assert (indices[0], indices[-1]) == (0, n - 1)
            assert np.all(np.diff(indices) > 0)
            subsets = itertools.combinations(range(1, n - 1), k - 2)
            least = min(total(cost, np.array([0, *inner, n - 1])) for inner in subsets)
            np.testing.assert_allclose(total(cost, indices), least, rtol=1e-13)


def test_one_level_is_the_noisiest_and_all_are_all():
    cost = np.random.default_rng(0).random((6, 6))
    found = spacing.bound_optimal(cost, 6)
    np.testing.assert_array_equal(found[1], [5])
    np.testing.assert_array_equal(found[2], [0, 5])
    np.testing.assert_array_equal(found[6], np.arange(6))
    np.testing.assert_array_equal(spacing.bound_optimal(np.zeros((1, 1)), 1)[1], [0])


def test_fewer_levels_do_not_depend_on_how_many_were_asked_for():
    cost = np.random.default_rng(1).random((40, 40))
    many, few = spacing.bound_optimal(cost, 40), spacing.bound_optimal(cost, 7)
    for k, indices in few.items():
        np.testing.assert_array_equal(indices, many[k])


def test_where_costs_are_lengths_any_levels_will_do():
    place = np.cumsum(np.random.default_rng(2).random(30))
    cost = place[None] - place[:, None]
    for k, indices in spacing.bound_optimal(cost, 30).items():
        if k > 1:
            np.testing.assert_allclose(total(cost, indices), place[-1] - place[0], rtol=1e-13)


def test_each_level_more_lowers_the_bound_of_a_gaussian_to_its_information():
    """With Σ_θ = β̃ the optimal denoiser's bound falls to ½ ∫ E‖ε − ε̂‖² dλ = ΔI as gaps vanish."""
    _, cost = gaussian_costs(200)
    found = spacing.bound_optimal(cost, 200)
    best = np.array([total(cost, found[k]) for k in range(2, 201)])
    assert np.all(np.diff(best) < 0)
    data = problems.testbed()
    information = data.mutual_information(9.0) - data.mutual_information(-6.0)
    assert np.all(best > information)
    # The excess of a sum over K steps falls as 1/K.
    excess = {k: best[k - 2] - information for k in (50, 100)}
    np.testing.assert_allclose(excess[50] / excess[100], 2, rtol=0.1)


def test_the_best_levels_of_a_gaussian_beat_every_rule():
    """By more than rounding; a rule's levels are rounded to candidates that are 0.005 apart."""
    log_snr, cost = gaussian_costs(601)
    found = spacing.bound_optimal(cost, 50)
    for k in (5, 10, 25, 50):
        for of in spacing.SPACINGS.values():
            at = of(LINE, k).log_snr[1:]
            ruled = np.abs(log_snr[:, None] - at).argmin(axis=0)
            assert total(cost, found[k]) < total(cost, ruled) * 0.999


def test_more_candidates_never_cost_more():
    coarse, fine = (gaussian_costs(n)[1] for n in (31, 61))
    np.testing.assert_allclose(fine[::2, ::2], coarse, rtol=1e-12)
    of_coarse, of_fine = (spacing.bound_optimal(cost, 31) for cost in (coarse, fine))
    for k in range(3, 32):
        assert total(fine, of_fine[k]) <= total(coarse, of_coarse[k]) * (1 + 1e-12)


def test_mistakes_are_errors():
    cost = np.zeros((4, 4))
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"num_timesteps = {k}; choose from 1 to 4"):
            spacing.bound_optimal(cost, k)
    with pytest.raises(ValueError, match="NaN"):
        spacing.bound_optimal(np.full((4, 4), np.nan), 3)
