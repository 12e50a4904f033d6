"""Distances between sets of samples: closed forms, brute force, and errors against scatter."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from diffusion import quality
from diffusion.quality import (
    Moments,
    frechet_distance,
    frechet_mc_se,
    kernel_distance,
    precision_recall,
)


def moments_of(x):
    return Moments.empty(x.shape[1]).update(x)


def exact_moments(mean, covariance):
    """Moments of a distribution, as a set would have them whose own are these."""
    count = 1000
    return Moments(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


def rotation(rng, f):
    return np.linalg.qr(rng.normal(size=(f, f)))[0]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, the last of them partial."""
    monkeypatch.setattr(quality, "_BLOCK_SIZE", 50)


# Moments


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


# The Fréchet distance


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


# The kernel distance


def kernel(x, y):
    return (np.dot(x, y) / len(x) + 1) ** 3


def test_kernel_distance_by_brute_force(small_blocks):
    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(13, 3)), rng.normal(size=(17, 3)) + 1
    of_x = np.mean([kernel(*pair) for pair in itertools.permutations(x, 2)])
    of_y = np.mean([kernel(*pair) for pair in itertools.permutations(y, 2)])
    across = np.mean([kernel(*pair) for pair in itertools.product(x, y)])
    assert kernel_distance(x, y).mean == pytest.approx(of_x + of_y - 2 * across, rel=1e-12)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(11)
    x, y = rng.normal(size=(13, 3)), rng.normal(size=(17, 3))
    whole = kernel_distance(x, y), precision_recall(x, y)
    monkeypatch.setattr(quality, "_BLOCK_SIZE", 50)
    np.testing.assert_allclose(kernel_distance(x, y), whole[0], rtol=1e-11)
    assert precision_recall(x, y) == whole[1]
    monkeypatch.setattr(quality, "_BLOCK_SIZE", 1)  # less than a row
    np.testing.assert_allclose(kernel_distance(x, y), whole[0], rtol=1e-11)
    assert precision_recall(x, y) == whole[1]


def test_kernel_distance_of_exchanged_and_rotated_sets():
    rng = np.random.default_rng(12)
    x, y = rng.normal(size=(13, 4)), rng.gamma(1.0, size=(17, 4))
    here, there = kernel_distance(x, y), kernel_distance(y, x)
    np.testing.assert_allclose(there[:2], here[:2], rtol=1e-12)
    q = rotation(rng, 4)
    np.testing.assert_allclose(kernel_distance(x @ q, y @ q), here, rtol=1e-11)


def enumerated(p, atoms, count):
    """Every set of `count` draws from two atoms, whatever their order, with its probability."""
    chances = scipy.stats.binom.pmf(np.arange(count + 1), count, 1 - p)
    return chances, [atoms[[0] * (count - i) + [1] * i] for i in range(count + 1)]


@pytest.mark.parametrize(("p", "q", "most"), [(0.5, 0.5, 2.2), (0.3, 0.4, 2.2), (0.2, 0.9, 1)])
def test_kernel_distance_over_all_sets_of_two_atoms(p, q, most):
    """The mean is unbiased: MMD² = (p − q)² (k_00 − 2k_01 + k_11), of the first atom's chances.

    So are the squared errors far apart, where the floor under them is never met: exactly, but for
    sets of a chance of 1e-6. Elsewhere they are not below the variance, nor far above its double.
    """
    atoms = np.array([[0.3, -0.2], [1.0, 0.6]])
    (chance_x, sets_x), (chance_y, sets_y) = enumerated(p, atoms, 20), enumerated(q, atoms, 15)
    of = np.array([[kernel_distance(x, y) for y in sets_y] for x in sets_x])
    mean, se, mc_se = np.moveaxis(of, -1, 0)
    (k_00, k_01), (_, k_11) = [[kernel(a, b) for b in atoms] for a in atoms]
    truth = (p - q) ** 2 * (k_00 - 2 * k_01 + k_11)
    assert chance_x @ mean @ chance_y == pytest.approx(truth, abs=1e-12)
    variance = chance_x @ (mean - truth) ** 2 @ chance_y
    assert 1 <= (chance_x @ se**2 @ chance_y) / variance < most + 1e-5

    given_x = (mean - (mean @ chance_y)[:, None]) ** 2 @ chance_y
    ratio = (mc_se**2 @ chance_y) / given_x
    assert np.all((ratio > 1 - 1e-12) & (ratio < 2.4))
    # Real sets of mostly the other atom are far from every likely set of fakes.
    assert ratio.min() == pytest.approx(1, abs=1e-5)


def signs(rng, count, f=20):
    """Independent coordinates ±1: bounded, so that estimated errors are near the true ones."""
    return rng.choice([-1.0, 1.0], size=(count, f))


def mmd_of_signs(shift, f=20):
    """MMD² of `signs` and of signs + c. A cube's mean is base³ + 3 base · variance + third moment.

    With v = s s′ a product of signs, E v = 0 and E v² = 1. Of (s + c)(s′ + c) = c² + v + c s + c s′
    the variance is 1 + 2c² and the third moment 6c²; of s (s′ + c), 1 + c² and none. A mean over f
    coordinates divides them by f and by f².
    """
    real = 1 + 3 / f
    base = 1 + shift**2
    fake = base**3 + 3 * base * (1 + 2 * shift**2) / f + 6 * shift**2 / f**2
    return real + fake - 2 * (1 + 3 * (1 + shift**2) / f)


def ratio_and_error(above, below):
    """A ratio of two means with its standard error, by the delta method."""
    ratio = above.mean() / below.mean()
    error = (above - ratio * below).std(ddof=1) / np.sqrt(len(above)) / below.mean()
    return ratio, error


SHIFTS = pytest.mark.parametrize(
    ("shift", "most"), [(0.5, 1.0), (0.1, 1.3), (0.0, 2.0)], ids=["far", "near", "equal"]
)


@SHIFTS
def test_kernel_error_is_the_scatter_about_the_truth(shift, most):
    """E[se²] is the variance far apart, and at most twice it where the distributions are equal.

    The score (mean − truth)/se has a mean square of one, or between a half and one.
    """
    num_sets, n, m = 500, 70, 50
    rng = np.random.default_rng(13)
    of = [kernel_distance(signs(rng, n), signs(rng, m) + shift) for _ in range(num_sets)]
    mean, se, _ = np.array(of).T
    scatter = (mean - mmd_of_signs(shift)) ** 2
    assert abs(mean.mean() - mmd_of_signs(shift)) < 4 * mean.std() / np.sqrt(num_sets)
    ratio, error = ratio_and_error(se**2, scatter)
    assert 1 - 4 * error < ratio < most + 4 * error
    scores = scatter / se**2
    # The error's own noise adds O(1/n) to a mean square.
    tolerance = 4 * scores.std() / np.sqrt(num_sets) + 3 / m
    assert 1 / most - tolerance < scores.mean() < 1 + tolerance


@SHIFTS
def test_kernel_error_over_fakes_is_the_scatter_with_the_real_set_fixed(shift, most):
    """And less than the error over both sets, which is about the populations."""
    rng = np.random.default_rng(15)
    x = signs(rng, 80)
    of = [kernel_distance(x, signs(rng, 100) + shift) for _ in range(500)]
    mean, se, mc_se = np.array(of).T
    ratio, error = ratio_and_error(mc_se**2, (mean - mean.mean()) ** 2)
    assert 1 - 4 * error < ratio < most + 4 * error
    assert np.mean(mc_se) < np.mean(se)


# Precision and recall


def reach(x, k):
    """The distance of each sample to its k-th nearest other."""
    return [
        sorted(np.linalg.norm(a - b) for j, b in enumerate(x) if j != i)[k - 1]
        for i, a in enumerate(x)
    ]


def share_within(centres, x, k):
    radii = reach(centres, k)
    near = [any(np.linalg.norm(a - c) <= r for c, r in zip(centres, radii, strict=True)) for a in x]
    return np.mean(near)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("kind", ["normal", "grey levels"])
def test_precision_and_recall_by_brute_force(k, kind, small_blocks):
    """Grey levels have duplicates and distances that are equal to the last bit."""
    rng = np.random.default_rng(16)
    if kind == "normal":
        x, y = rng.normal(size=(31, 3)), 1.2 * rng.normal(size=(26, 3)) + 0.8
    else:
        x, y = rng.integers(0, 3, (31, 4)).astype(float), rng.integers(1, 4, (26, 4)).astype(float)
    expected = share_within(x, y, k), share_within(y, x, k)
    assert 0 < min(expected) <= max(expected) < 1 or kind != "normal"
    assert precision_recall(x, y, k) == expected
    assert precision_recall(y, x, k) == expected[::-1]


def test_precision_and_recall_of_known_sets():
    """Collapse is precise and recalls little; noise all about recalls all and is imprecise."""
    grid = np.arange(10.0)[:, None]
    assert precision_recall(grid, grid) == (1, 1)
    assert precision_recall(grid, grid + 100) == (0, 0)
    assert precision_recall(grid, np.full((5, 1), 4.0)) == (1, 0.1)
    # Fakes reach 30 each, over the whole grid; two of five lie within three of it.
    assert precision_recall(grid, 10 * np.arange(-2.0, 3.0)[:, None]) == (0.4, 1)


@pytest.mark.parametrize("far", [0.0, 1e6, 1e9])
def test_duplicates_and_ties_far_from_the_origin(far):
    """A distance of zero, or one that equals a radius, where ‖x‖² + ‖y‖² − 2xᵀy rounds to 1e18 ε.

    Every real sample has one twin, so that a reach of k = 1 is zero: only exact copies are within.
    """
    rng = np.random.default_rng(17)
    x = far + rng.normal(size=(20, 7))
    twins = np.repeat(x, 2, axis=0)
    copies, others = x[:6], np.nextafter(x[6:], np.inf)
    assert precision_recall(twins, np.concatenate([copies, others]), k=1).precision == 6 / 20

    # The k-th neighbour itself is on the surface of the ball, and one further out is not.
    line = far + np.array([0.0, 1, 2, 3])[:, None] * np.ones(5)
    on, outside = line[3] + 1, np.nextafter(line[3] + 1, np.inf)
    fakes = np.stack([on, outside, outside + 100, outside + 200])
    assert precision_recall(line, fakes, k=1).precision == 1 / 4


# What is refused


def everything(x, y):
    return [
        lambda: frechet_mc_se(moments_of(x), y, num_groups=2),
        lambda: kernel_distance(x, y),
        lambda: precision_recall(x, y),
    ]


@pytest.mark.parametrize("which", range(3))
def test_bad_features_are_named(which):
    x = np.random.default_rng(19).normal(size=(8, 3))
    bad = x.copy()
    bad[5, 1] = np.nan
    with pytest.raises(ValueError, match="fake: sample 5 has features that are not finite"):
        everything(x, bad)[which]()
    with pytest.raises(ValueError, match="fake has 2 features a sample; it must have 3"):
        everything(x, x[:, :2])[which]()
    with pytest.raises(ValueError, match=r"fake has shape \(8, 3, 1\)"):
        everything(x, x[:, :, None])[which]()
    with pytest.raises(ValueError, match="fake has 3 samples; it needs at least 4"):
        everything(x, x[:3])[which]()
    everything(x, x[:4])[which]()


def test_bad_real_features_and_settings_are_named():
    x = np.random.default_rng(20).normal(size=(8, 3))
    with pytest.raises(ValueError, match="real has 3 samples"):
        kernel_distance(x[:3], x)
    with pytest.raises(ValueError, match=r"real has 5 samples; it needs at least 6.* k = 5"):
        precision_recall(x[:5], x, k=5)
    with pytest.raises(ValueError, match="k = 0; it must be at least 1"):
        precision_recall(x, x, k=0)
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
