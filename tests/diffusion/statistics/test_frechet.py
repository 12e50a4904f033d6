"""Moments of features and the Fréchet distance: closed forms, and errors against scatter."""

import numpy as np
import pytest
import scipy.linalg

from diffusion.statistics.sample_quality import Moments, frechet_distance, frechet_mc_se


def moments_of(x):
    return Moments.empty(x.shape[1]).update(x)


def exact_moments(mean, covariance):
    """Moments of a distribution, as a set would have them whose own are these."""
    count = 1000
    return Moments(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


def rotation(rng, f):
    return np.linalg.qr(rng.normal(size=(f, f)))[0]


@pytest.mark.parametrize("sizes", [[23], [1] * 23, [7, 7, 7, 2], [0, 20, 0, 3]])
def test_moments_of_batches_are_those_of_the_whole(sizes):
    """A mean of 1e6 and a spread of one: a sum of squares would lose twelve digits."""
    x = np.random.default_rng(0).normal(size=(23, 4)) + 1e6
    moments = Moments.empty(4)
    for batch in np.split(x, np.cumsum(sizes)[:-1]):
        moments = moments.update(batch)
    assert moments.count == 23
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-15)
    np.testing.assert_allclose(moments.covariance, np.cov(x.T), rtol=1e-8, atol=1e-9)


def test_a_part_taken_away_leaves_the_rest():
    x = np.random.default_rng(1).normal(size=(30, 3))
    rest = moments_of(x).without(moments_of(x[4:11]))
    expected = moments_of(np.delete(x, slice(4, 11), axis=0))
    assert rest.count == expected.count
    np.testing.assert_allclose(rest.mean, expected.mean, atol=1e-14)
    np.testing.assert_allclose(rest.scatter, expected.scatter, atol=1e-13)


def test_moments_of_narrow_numbers_are_in_float64():
    """100 000 float32 numbers, whose own sum would round at 1e-3; and bytes, which would wrap."""
    x = np.tile(np.float32([[0.1], [0.3]]), (50_000, 1))
    np.testing.assert_allclose(moments_of(x).mean, np.float32([0.1, 0.3]).mean(dtype=float))
    assert moments_of(np.uint8([[0], [255]])).covariance == pytest.approx(255**2 / 2)


def test_diagonal_gaussians_in_closed_form():
    """Independent coordinates: Σ (m_a − m_b)² + (s_a − s_b)²."""
    rng = np.random.default_rng(2)
    mean_a, mean_b, std_a, std_b = np.abs(rng.normal(size=(4, 6)))
    std_a[:2] = 0.0
    std_b[1:3] = 0.0
    a, b = exact_moments(mean_a, np.diag(std_a**2)), exact_moments(mean_b, np.diag(std_b**2))
    expected = np.sum((mean_a - mean_b) ** 2 + (std_a - std_b) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-13)


def test_a_shifted_set_is_as_far_as_its_shift():
    x = np.random.default_rng(3).normal(size=(40, 5))
    shift = np.array([3.0, 0, -1, 0.5, 2])
    assert frechet_distance(moments_of(x), moments_of(x + shift)) == pytest.approx(shift @ shift)
    # Nothing but the rounding of the traces is left.
    assert 0 <= frechet_distance(moments_of(x), moments_of(x)) < 1e-13


def test_full_covariances_against_scipy():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(50, 8)) @ rng.normal(size=(8, 8)), rng.gamma(1.0, size=(60, 8))
    c_x, c_y = np.cov(x.T), np.cov(y.T)
    cross = np.trace(scipy.linalg.sqrtm(c_x @ c_y)).real
    squared_shift = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2)
    expected = squared_shift + np.trace(c_x) + np.trace(c_y) - 2 * cross
    assert frechet_distance(moments_of(x), moments_of(y)) == pytest.approx(expected, rel=1e-11)


def test_fewer_samples_than_features():
    """Covariances uuᵀ and vvᵀ on two points each: ‖u‖² + ‖v‖² − 2|uᵀv|; then a general pair.

    tr (C_a^{1/2} C_b C_a^{1/2})^{1/2} is the nuclear norm of the centred data's product.
    """
    rng = np.random.default_rng(5)
    u, v = rng.normal(size=(2, 30))
    line = [moments_of(np.stack([w, -w]) / np.sqrt(2)) for w in (u, v)]
    assert frechet_distance(*line) == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-13)

    x, y = rng.normal(size=(6, 30)), 2 * rng.normal(size=(9, 30))
    a, b = (x - x.mean(axis=0)) / np.sqrt(5), (y - y.mean(axis=0)) / np.sqrt(8)
    expected = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) + np.sum(a**2) + np.sum(b**2)
    expected -= 2 * np.linalg.norm(a @ b.T, "nuc")
    assert frechet_distance(moments_of(x), moments_of(y)) == pytest.approx(expected, rel=1e-13)


def test_frechet_distance_of_rotated_shifted_scaled_features():
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(30, 5)), rng.gamma(1.0, size=(40, 5))
    before = frechet_distance(moments_of(x), moments_of(y))
    q, shift = rotation(rng, 5), rng.normal(size=5)
    after = frechet_distance(moments_of(3 * x @ q + shift), moments_of(3 * y @ q + shift))
    assert after == pytest.approx(9 * before, rel=1e-12)
    assert frechet_distance(moments_of(y), moments_of(x)) == pytest.approx(before, rel=1e-12)


def test_frechet_error_is_the_scatter_over_sets():
    """N(½, 1.2²) against N(0, 1) in three dimensions: the delta method gives the variance.

    Of ‖δ‖² + Σ(s − 1)²: 4‖δ‖²s²/n + 3 · 4(s − 1)² s²/2n.
    """
    num_sets, n, shift, std = 300, 400, 0.5, 1.2
    rng = np.random.default_rng(7)
    real = exact_moments(np.zeros(3), np.eye(3))
    sets = rng.normal(size=(num_sets, n, 3)) * std + shift
    distances = np.array([frechet_distance(real, moments_of(y)) for y in sets])
    errors = np.array([frechet_mc_se(real, y, num_groups=20) for y in sets])
    # The scatter's own variance has a relative error of √(2/300).
    assert np.mean(errors**2) / distances.var(ddof=1) == pytest.approx(
        1, abs=4 * np.sqrt(2 / num_sets)
    )
    theory = (12 * shift**2 * std**2 + 6 * (std - 1) ** 2 * std**2) / n
    # The mean of 300 squared errors has 1/√300 of a square's √(2/19), and the theory is O(1/n) off.
    assert np.mean(errors**2) == pytest.approx(theory, rel=4 * np.sqrt(2 / 19 / num_sets) + 0.02)


def test_frechet_error_of_samples_whose_classes_take_turns():
    """Ten far classes, as many of each in every set: only what varies within them is an error."""
    num_sets, n = 200, 1000
    rng = np.random.default_rng(9)
    centres = rng.normal(size=(10, 3)) * 3
    real = exact_moments(np.zeros(3), np.eye(3))
    sets = rng.normal(size=(num_sets, n, 3)) + centres[np.arange(n) % 10]
    distances = np.array([frechet_distance(real, moments_of(y)) for y in sets])
    errors = np.array([frechet_mc_se(real, y) for y in sets])
    ratio = np.mean(errors**2) / distances.var(ddof=1)
    assert ratio == pytest.approx(1, abs=4 * np.sqrt(2 / num_sets))


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_frechet_error_is_never_too_small_near_the_real_moments(shift):
    """Up to twice the variance on the average, and never below it: tolerances of 4√(2/200)."""
    num_sets, f = 200, 4
    rng = np.random.default_rng(8)
    real = exact_moments(np.zeros(f), np.eye(f))
    sets = rng.normal(size=(num_sets, 200, f)) + shift
    distances = np.array([frechet_distance(real, moments_of(y)) for y in sets])
    errors = np.array([frechet_mc_se(real, y, num_groups=20) for y in sets])
    ratio, tolerance = np.mean(errors**2) / distances.var(ddof=1), 4 * np.sqrt(2 / num_sets)
    assert 1 - tolerance < ratio < 2 * (1 + tolerance)


def test_bad_moments_and_settings_are_named():
    x = np.random.default_rng(20).normal(size=(8, 3))
    with pytest.raises(ValueError, match="num_groups = 1; it must be at least 2"):
        frechet_mc_se(moments_of(x), x, num_groups=1)
    with pytest.raises(ValueError, match="at least 10, two for each of 5 groups"):
        frechet_mc_se(moments_of(x), x, num_groups=5)
    with pytest.raises(ValueError, match="count = 1; a covariance needs at least 2"):
        frechet_distance(moments_of(x[:1]), moments_of(x))
    with pytest.raises(ValueError, match="fake has 2 features a sample; it must have 3"):
        frechet_distance(moments_of(x), moments_of(x[:, :2]))
    with pytest.raises(ValueError, match="features are 2 a sample; they must be 3"):
        moments_of(x).update(x[:, :2])
    with pytest.raises(ValueError, match=r"sample 0 .* not finite"):
        Moments.empty(1).update(np.array([[np.inf]]))
