"""Standard errors against the scatter that they claim to predict."""

import jax
import numpy as np
import pytest

from diffusion import bound, decoders, schedules
from diffusion.exact import distributions
from diffusion.model import DiffusionModel
from diffusion.statistics.standard_errors import (
    bits_per_dim,
    estimate,
    noise_variance,
    replicate_timesteps,
)
from tests.diffusion import problems

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_bits_per_dim():
    np.testing.assert_allclose(bits_per_dim(np.log(2) * np.array([3.0, 6.0]), 3), [1, 2])
    assert bits_per_dim(np.ones(2, np.float32), 3).dtype == np.float64


@pytest.mark.parametrize(
    ("num_timesteps", "num_replicates"), [(2, 1), (10, 4), (1000, 16), (5, 100), (5, 4)]
)
def test_replicates_cover_every_timestep_about_equally(num_timesteps, num_replicates):
    index = np.arange(2000)
    t = replicate_timesteps(index, num_timesteps, num_replicates)
    num_terms = num_timesteps - 1
    assert t.shape == (2000, min(num_replicates, num_terms))
    assert t.min() == 2
    assert t.max() == num_timesteps
    assert np.all(np.diff(t, axis=1) > 0)  # an example's own are distinct
    counts = np.bincount(t.ravel(), minlength=num_timesteps + 1)[2:]
    # The golden ratio's points are within 2 log n of even coverage.
    assert np.all(np.abs(counts - t.size / num_terms) < 2 * np.log(2000))


def test_replicates_of_an_example_depend_on_its_index_alone():
    whole = replicate_timesteps(np.arange(50), 30, 7)
    np.testing.assert_array_equal(replicate_timesteps(np.array([42, 3]), 30, 7), whole[[42, 3]])
    assert len(np.unique(whole, axis=0)) > 4


def test_one_timestep_has_no_kl_to_replicate():
    t = replicate_timesteps(np.arange(3), 1, 8)
    assert t.shape == (3, 0)
    np.testing.assert_array_equal(noise_variance(np.zeros((3, 0)), np.zeros((3, 0)), 0), 0)


def test_half_the_squared_difference_is_an_unbiased_variance():
    """Two of three terms of variances 1, 4 and 9 in turn stand for all: 14 on the average."""
    rng, n = np.random.default_rng(0), 30_000
    std = np.array([1.0, 2.0, 3.0])
    chosen = np.stack([np.arange(n) % 3, (np.arange(n) + 1) % 3], axis=1)
    first, second = rng.normal(size=(2, n, 2)) * std[chosen]
    variance = noise_variance(first, second, num_terms=3)
    assert variance.shape == (n,)
    assert abs(variance.mean() - 14) < 4 * variance.std() / np.sqrt(n)


def synthetic(seed, n=40, num_terms=6):
    """An estimate from n examples of known spread 2 whose terms have known noise, 8 in all."""
    rng = np.random.default_rng(seed)
    example = rng.normal(size=n) * 2.0 + 10.0
    std = np.sqrt(8 * np.arange(1, num_terms + 1) / 21)
    first, second = rng.normal(size=(2, n, num_terms)) * std
    t = replicate_timesteps(np.arange(n), num_terms + 1, 3) - 2
    of = [np.take_along_axis(draw, t, axis=1) for draw in (first, second)]
    total = example + first.sum(1)
    return estimate(total, noise_variance(*of, num_terms), num_dims=5), example.mean()


def test_both_errors_are_calibrated():
    """(mean − truth)/error is standard: its mean square is one, within 4 standard errors of it.

    `se` is about the population's mean, 10 nats; `mc_se` about these examples' own.
    """
    num_seeds, per_dim = 1000, 5 * np.log(2)
    results = [synthetic(seed) for seed in range(num_seeds)]
    mean, se, mc_se = np.array([result for result, _ in results]).T
    truth = np.array([truth for _, truth in results]) / per_dim
    tolerance = 4 * np.sqrt(2 / num_seeds)
    assert np.mean((mean - 10 / per_dim) ** 2) / np.mean(se**2) == pytest.approx(1, abs=tolerance)
    assert np.mean((mean - truth) ** 2) / np.mean(mc_se**2) == pytest.approx(1, abs=tolerance)
    # And against theory: variances 4 + 8 over 40 examples, and 8 over 40 with the examples fixed.
    assert np.mean(se**2) * per_dim**2 == pytest.approx(12 / 40, rel=0.05)
    assert np.mean(mc_se**2) * per_dim**2 == pytest.approx(8 / 40, rel=0.05)


def test_two_examples_by_hand():
    """Bits of 1 and 3: a standard deviation of √2 over √2; noise of 3² and 4² over two."""
    nats = np.log(2) * np.array([1.0, 3.0])
    result = estimate(nats, np.log(2) ** 2 * np.array([9.0, 16.0]), num_dims=1)
    np.testing.assert_allclose(result, [2, 1, 2.5], rtol=1e-12)


def test_one_example_has_an_error_over_noise_only():
    result = estimate(np.array([7.0]), np.array([0.49]), num_dims=1)
    assert result.mean * np.log(2) == pytest.approx(7)
    assert np.isnan(result.se)
    assert result.mc_se * np.log(2) == pytest.approx(0.7)


def test_totals_accumulate_in_float64():
    """A million float32 examples of 1e4 nats and a spread of one."""
    values = np.float32(1e4 + np.tile([-1.0, 1.0], 500_000))
    result = estimate(values, np.zeros(10**6), num_dims=1)
    assert result.mean * np.log(2) == pytest.approx(1e4, rel=1e-12)
    assert result.se * np.log(2) == pytest.approx(1e-3, rel=1e-5)
    assert result.mc_se == 0


def test_reported_noise_of_a_real_bound_is_its_scatter_over_seeds():
    num_seeds, num_timesteps, n, dims = 200, 12, 48, 2
    data = distributions.normal(np.zeros(2, np.float32), np.diag([1.0, 0.1]).astype(np.float32))
    levels = schedules.linear_log_snr(5.0, -5.0).levels(num_timesteps)
    model = DiffusionModel(problems.predicting(data, "eps"), decoders.gaussian(0.01), levels)
    rng = np.random.default_rng(1)
    x_0 = (rng.normal(size=(n, dims)) * np.sqrt(np.diag(data.covariance))).astype(np.float32)
    tables = rng.normal(size=(2, num_seeds, n, num_timesteps + 1, dims)).astype(np.float32)

    @jax.jit
    @jax.vmap
    def evaluate(table):
        noise = problems.tabulated(table, np.arange(n))
        b = bound.bound(model, x_0, noise, chunk_size=11)
        return b, b.total

    first, total = jax.tree.map(np.asarray, evaluate(tables[0]))
    second, _ = jax.tree.map(np.asarray, evaluate(tables[1]))

    # Six examples with every term drawn twice; all of them with three of the eleven.
    for index, num_replicates in ((np.arange(6), 11), (np.arange(n), 3)):
        t = replicate_timesteps(index, num_timesteps, num_replicates)
        results = []
        for seed in range(num_seeds):
            of_kl = (np.take_along_axis(b.kl[seed, index], t - 2, axis=1) for b in (first, second))
            of_decoder = (b.reconstruction[seed, index, None] for b in (first, second))
            variance = noise_variance(*of_kl, num_timesteps - 1) + noise_variance(*of_decoder, 1)
            results.append(estimate(total[seed, index], variance, dims))
        mean, _, mc_se = np.array(results).T
        # The scatter of 200 has a relative error of 1/√400; the errors' own, less; 4 of them.
        assert np.sqrt(np.mean(mc_se**2)) / mean.std(ddof=1) == pytest.approx(1, abs=0.2)
