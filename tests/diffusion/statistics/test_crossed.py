"""Means over crossed seeds and examples: closed forms, coverage of the intervals, Holm's tests."""

import itertools

import numpy as np
import pytest
import scipy.stats

from diffusion.statistics.crossed import (
    crossed_mean,
    holm,
    two_sided_p,
    two_sided_quantile,
)


def synthetic(rng, shape, seed=0.0, example=0.0, interaction=0.0, noise=0.0, seed_noise=0.0):
    """Measurements of expectation zero from standard deviations of the five effects."""
    num_seeds, n, draws = shape
    return (
        seed * rng.normal(size=(num_seeds, 1, 1))
        + example * rng.normal(size=(1, n, 1))
        + interaction * rng.normal(size=(num_seeds, n, 1))
        + noise * rng.normal(size=(1, n, draws))
        + seed_noise * rng.normal(size=shape)
    )


def test_the_formula_where_each_component_is_present():
    """s²(seed means)/S + s²(example means)/N − s²(interaction)/(SN)."""
    totals = synthetic(np.random.default_rng(0), (4, 30, 3), 2.0, 3.0, 1.0, 1.0, 1.0) + 5.0
    values = totals.mean(axis=2)
    seeds, examples = values.mean(axis=1), values.mean(axis=0)
    rest = values - seeds[:, None] - examples + values.mean()
    parts = np.array([seeds.var(ddof=1) / 4, examples.var(ddof=1) / 30])
    interaction = (rest**2).sum() / (3 * 29) / (4 * 30)
    result = crossed_mean(totals)
    assert result.mean == pytest.approx(totals.mean(), rel=1e-12)
    assert result.se**2 == pytest.approx(parts.sum() - interaction, rel=1e-12)
    spread = parts[0] ** 2 / 3 + parts[1] ** 2 / 29 + interaction**2 / (3 * 29)
    assert result.df == pytest.approx(result.se**4 / spread, rel=1e-12)


def test_errors_are_the_scatter_of_the_mean():
    """Both errors squared against the variances of the model, noise that seeds share included.

    The tolerances are 4 standard errors of the means over 1500 repetitions.
    """
    rng, shape = np.random.default_rng(1), (5, 20, 2)
    effects = {"seed": 1.0, "example": 2.0, "interaction": 1.0, "noise": 3.0, "seed_noise": 2.0}
    results = np.array([crossed_mean(synthetic(rng, shape, **effects)) for _ in range(1500)])
    mean, se, _, mc_se = results.T
    by_noise = 9 / (20 * 2) + 4 / (5 * 20 * 2)
    variance = 1 / 5 + 4 / 20 + 1 / (5 * 20) + by_noise
    for squares, expected in ((mean**2, variance), (se**2, variance), (mc_se**2, by_noise)):
        assert abs(squares.mean() - expected) < 4 * squares.std() / np.sqrt(1500)


REGIMES = {
    "seeds": {"seed": 1.0, "example": 0.03, "interaction": 0.1},
    "examples": {"example": 1.0, "interaction": 0.05},
    "examples and a little of seeds": {"seed": 0.02, "example": 1.0, "interaction": 0.5},
    "interaction": {"interaction": 1.0},
    "interaction and examples": {"example": 0.3, "interaction": 1.0},
    "noise": {"noise": 1.0},
    "noise by seed": {"seed_noise": 1.0},
    "all": {"seed": 0.1, "example": 1.0, "interaction": 1.0, "noise": 1.0},
}


def p_values(results):
    """`p_value` of many results at once, which scipy computes faster."""
    mean, se, df, _ = np.array(results).T
    return 2 * scipy.stats.t.sf(np.abs(mean / se), df)


def coverage(shape, effects, repetitions=600):
    """The share of 95 % intervals that contain the expectation, zero."""
    rng = np.random.default_rng(2)
    results = [crossed_mean(synthetic(rng, shape, **effects)) for _ in range(repetitions)]
    return np.mean(p_values(results) >= 0.05)


def binomial_error(share, repetitions=600):
    """3.5 standard errors of a share."""
    return 3.5 * np.sqrt(share * (1 - share) / repetitions)


@pytest.mark.parametrize("num_seeds", [2, 3, 10])
@pytest.mark.parametrize("effects", REGIMES.values(), ids=REGIMES)
def test_intervals_cover_the_truth_as_often_as_they_say(num_seeds, effects):
    """Where the interaction dominates they may cover it more often: A and B count as at least E."""
    share = coverage((num_seeds, 40, 2), effects)
    assert share > 0.95 - binomial_error(0.95)
    if effects.get("interaction", 0) < 1 and "seed_noise" not in effects:
        assert share < 0.95 + binomial_error(0.95)


@pytest.mark.parametrize(("num_seeds", "expected"), [(2, 0.87), (3, 0.925), (10, 0.95)])
def test_few_seeds_make_intervals_too_short_at_worst(num_seeds, expected):
    """Seeds with ten times the variance of examples: the known limit of Satterthwaite's formula.

    Two seeds are close to each other by chance rather often, and then seem not to matter.
    """
    n = 40
    effects = {"seed": np.sqrt(10 * num_seeds / n), "example": 1.0}
    assert coverage((num_seeds, n, 2), effects) == pytest.approx(
        expected, abs=binomial_error(expected)
    )


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_identical_settings_differ_by_exactly_zero(num_seeds):
    result = crossed_mean(np.zeros((num_seeds, 5, 2)))
    assert result.mean == result.se == result.mc_se == result.interval() == 0
    assert result.p_value == 1


def test_a_constant_difference_is_certain():
    result = crossed_mean(np.full((3, 5, 2), 0.25))
    assert (result.mean, result.se, result.p_value) == (0.25, 0.0, 0.0)


def test_one_seed_has_an_error_over_examples_only():
    totals = synthetic(np.random.default_rng(3), (1, 12, 4), example=1.0, noise=1.0)
    result, values = crossed_mean(totals), totals.mean(axis=(0, 2))
    assert result.se == pytest.approx(scipy.stats.sem(values), rel=1e-12)
    assert result.p_value == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue, rel=1e-9)
    low, _ = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert result.mean - result.interval() == pytest.approx(low, rel=1e-9)


def test_one_example_has_no_error_and_one_draw_no_error_over_noise():
    one = crossed_mean(np.ones((3, 1, 2)))
    assert np.isnan([one.se, one.df, one.p_value, one.interval()]).all()
    assert np.isnan(crossed_mean(np.ones((3, 2, 1))).mc_se)


def test_equal_seeds_do_not_reduce_the_error():
    """The same network three times tells no more of examples than once."""
    once = synthetic(np.random.default_rng(4), (1, 30, 2), example=1.0, noise=1.0)
    thrice = np.repeat(once, 3, axis=0)
    assert crossed_mean(thrice) == pytest.approx(crossed_mean(once), rel=1e-9)


def test_the_result_has_the_unit_of_the_measurements():
    """Also where squares of the squares would not be representable."""
    totals = synthetic(np.random.default_rng(5), (3, 8, 2), 1.0, 1.0, 1.0)
    plain, tiny = crossed_mean(totals), crossed_mean(1e-100 * totals)
    assert tiny.mean == pytest.approx(1e-100 * plain.mean, rel=1e-9, abs=0)
    assert tiny.se == pytest.approx(1e-100 * plain.se, rel=1e-9, abs=0)
    assert tiny.df == pytest.approx(plain.df, rel=1e-9)


@pytest.mark.parametrize("df", [1.0, 1.7, 3.0, 446.0])
def test_students_t_against_scipy(df):
    for t in (0.0, 0.3, 2.0, -12.0, 40.0):
        assert two_sided_p(t, df) == pytest.approx(2 * scipy.stats.t.sf(abs(t), df), rel=1e-9)
    for p in (0.9, 0.05, 1e-4):
        assert two_sided_quantile(p, df) == pytest.approx(scipy.stats.t.isf(p / 2, df), rel=1e-9)


def test_holm_by_hand():
    """0.005 · 4, 0.01 · 3, and 0.03 · 2 = 0.06, below which 0.04 · 1 may not fall."""
    corrected = holm(np.array([0.01, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(corrected, [0.03, 0.06, 0.06, 0.02], rtol=1e-12)
    np.testing.assert_array_equal(holm(np.array([0.7, 1.0])), [1, 1])
    assert holm(np.array([])).shape == (0,)


def test_holm_is_the_closed_test_of_bonferroni():
    """A hypothesis is rejected if each set of hypotheses that contains it is."""
    p = np.random.default_rng(6).random(7) ** 3
    sets = [
        np.array(chosen)
        for size in range(1, 8)
        for chosen in itertools.combinations(range(7), size)
    ]
    closed = [
        max(min(1.0, len(chosen) * p[chosen].min()) for chosen in sets if i in chosen)
        for i in range(7)
    ]
    np.testing.assert_allclose(holm(p), closed, rtol=1e-12)


def test_one_study_in_twenty_has_a_false_finding():
    """Eight differences to one baseline, four of which are zero, in 400 studies.

    The differences share the baseline's deviations, so that errors come together, and the share
    of studies with an error is at most 5 %, here within 3.5 standard errors.
    """
    rng, n, num_studies = np.random.default_rng(7), 30, 400
    truth = np.array([0.0] * 4 + [0.3, 0.6, 1.0, 3.0])
    false, found = 0, np.zeros(8)
    for _ in range(num_studies):
        totals = rng.normal(size=(9, 3, n, 1))
        totals[1:] += truth[:, None, None, None]
        significant = holm(p_values([crossed_mean(x - totals[0]) for x in totals[1:]])) <= 0.05
        false += significant[:4].any()
        found += significant
    assert false / num_studies < 0.05 + binomial_error(0.05, num_studies)
    assert found[7] > 0.9 * num_studies
