"""Kernel distance, precision and recall: brute force, closed forms, and errors against scatter."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from diffusion.statistics import sample_quality
from diffusion.statistics.sample_quality import (
    Moments,
    frechet_mc_se,
    kernel_distance,
    precision_recall,
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, the last of them partial."""
    monkeypatch.setattr(sample_quality, "_BLOCK_SIZE", 50)


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
    monkeypatch.setattr(sample_quality, "_BLOCK_SIZE", 50)
    np.testing.assert_allclose(kernel_distance(x, y), whole[0], rtol=1e-11)
    assert precision_recall(x, y) == whole[1]
    monkeypatch.setattr(sample_quality, "_BLOCK_SIZE", 1)  # less than a row
    np.testing.assert_allclose(kernel_distance(x, y), whole[0], rtol=1e-11)
    assert precision_recall(x, y) == whole[1]


def test_kernel_distance_of_exchanged_and_rotated_sets():
    rng = np.random.default_rng(12)
    x, y = rng.normal(size=(13, 4)), rng.gamma(1.0, size=(17, 4))
    here, there = kernel_distance(x, y), kernel_distance(y, x)
    np.testing.assert_allclose(there[:2], here[:2], rtol=1e-12)
    q = np.linalg.qr(rng.normal(size=(4, 4)))[0]
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


def everything(x, y):
    return [
        lambda: frechet_mc_se(Moments.empty(3).update(x), y, num_groups=2),
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
