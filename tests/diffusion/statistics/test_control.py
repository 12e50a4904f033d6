"""Control variates: of mean zero for every x_0, and all of the noise for data of their kind."""

import jax
import numpy as np
import pytest

from diffusion import bound
from diffusion.exact import distributions
from diffusion.reverse import Reverse
from diffusion.statistics.control import GaussianControl, PixelControl
from tests.diffusion import oracles

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize("log_snr", [-20.0, -3.0, 0.0, 4.0, 20.0])
def test_mean_over_the_noise_is_zero_for_every_x_0(log_snr):
    """A quadratic in ε: its mean at sigma points is exact. In float32, relative to its size."""
    rng = np.random.default_rng(0)
    control = GaussianControl.fit(rng.normal(size=(50, 2, 2, 1)) * 3, 0.01)
    eps = oracles.sigma_points(4).reshape(8, 2, 2, 1).astype(np.float32)
    for x in rng.normal(size=(3, 2, 2, 1)).astype(np.float32):
        values = control(np.broadcast_to(x, eps.shape), eps, np.full(8, log_snr, np.float32))
        assert np.all(np.isfinite(values))
        assert abs(float(np.mean(values))) < 1e-5 * (1 + float(np.abs(values).max()))


def test_on_gaussian_data_it_is_the_error_less_its_mean(float64):
    """The optimal denoiser's ‖ε − ε̂‖², minus the control, no longer depends on ε."""
    rng = np.random.default_rng(1)
    sample = rng.normal(size=(400, 3)) @ rng.normal(size=(3, 3)) + 0.5
    control = GaussianControl.fit(sample, 0.02)
    covariance = np.cov(sample.T, ddof=0) + 0.02 * np.eye(3)
    data = distributions.normal(sample.mean(0), covariance)
    x_0 = np.broadcast_to(sample[:1], (6, 3))
    log_snr = np.full(6, 1.3)
    eps = rng.normal(size=(6, 3))
    error = bound.continuous_rate(
        Reverse(data.denoiser, "x_0"), x_0, eps, log_snr, -np.ones(6)
    ).eps_error
    rest = error - jax.jit(control.__call__)(x_0, eps, log_snr)
    np.testing.assert_allclose(rest, rest[0], rtol=1e-9)


K = 9
VALUES = np.linspace(-1, 1, K)
SPACING = VALUES[1] - VALUES[0]
GRID = np.linspace(-8, 8, 8001)  # of ε: enough for float64's best by the trapezoidal rule
WEIGHTS = np.exp(-(GRID**2) / 2) / np.exp(-(GRID**2) / 2).sum()


def correlated_levels():
    """Pixels 0 and 1 are alike, 2 is constant, 3 never has the level 5."""
    rng = np.random.default_rng(2)
    levels = rng.integers(0, K, (300, 4))
    levels[:, 1] = np.clip(levels[:, 0] + rng.integers(0, 2, 300), 0, K - 1)
    levels[:, 2] = 4
    levels[levels[:, 3] == 5, 3] = 6
    return levels


@pytest.fixture(scope="module")
def pixels():
    levels = correlated_levels()
    gaussian = GaussianControl.fit(VALUES[levels], SPACING**2 / 12)
    control = PixelControl.fit(levels, VALUES, gaussian)
    return jax.jit(control.__call__)


@pytest.mark.parametrize("log_snr", [-20.0, -5.0, 0.0, 3.0, 4.5, 6.0, 20.0])
@pytest.mark.parametrize(
    "levels",
    [[3, 4, 4, 0], [0, K - 1, 4, 2], [2, 2, 7, 5]],
    ids=["usual", "surprising", "never seen"],
)
def test_pixels_mean_over_the_noise_is_zero(pixels, log_snr, levels):
    """Each pixel has an integral of its own, so that all can go through the same values of ε."""
    shape = len(GRID), 4
    x_0 = np.broadcast_to(np.float32(VALUES[levels]), shape)
    eps = np.broadcast_to(np.float32(GRID[:, None]), shape)
    values = np.float64(pixels(x_0, eps, np.full(len(GRID), log_snr, np.float32)))
    assert np.all(np.isfinite(values))
    std = np.sqrt(WEIGHTS @ values**2)
    # Float32 loses 1e-7 of the error, which itself is about d SNR where x_t is all noise.
    assert abs(WEIGHTS @ values) < 2e-4 * std + 1e-6 * min(4 * np.exp(log_snr), 4.0)


def test_two_levels_have_a_tanh(float64):
    """E[x_0 | x_t] = tanh(α x_t/σ²) if x_0 is 1 or −1, and the error is (α/σ)² (x_0 − x̂_0)²."""
    gaussian = GaussianControl.fit(np.array([[1.0], [-1.0]]), 0.1)
    control = PixelControl.fit(np.array([[0], [1]]), np.array([-1.0, 1.0]), gaussian)
    eps, log_snr = np.linspace(-3, 3, 7)[:, None], np.full(7, 0.8)
    found = jax.jit(control.__call__)(np.ones((7, 1)), eps, log_snr)
    snr = np.exp(0.8)

    def error(eps):
        return snr * (1 - np.tanh(snr + np.sqrt(snr) * eps)) ** 2

    # |ε| exceeds the last node with a probability of 4e-8.
    np.testing.assert_allclose(found, error(eps[:, 0]) - WEIGHTS @ error(GRID), atol=2e-7)


def test_on_independent_pixels_it_is_the_error_less_its_mean(float64):
    """The rest of x_0 says nothing about a pixel, so the prior is the true distribution."""
    rng = np.random.default_rng(3)
    shares = rng.dirichlet(np.ones(3), 2)
    values = np.array([-1.0, 0.0, 1.0])
    first, second = (axis.ravel() for axis in np.meshgrid(values, values, indexing="ij"))
    weights = np.outer(*shares).ravel()
    data = distributions.Mixture(weights, np.stack([first, second], axis=1), None)
    gaussian = GaussianControl(data.mean, *_eigen(data.covariance))
    control = PixelControl(gaussian, values, np.log(shares))
    x_0, eps = np.tile([[1.0, 0.0]], (6, 1)), rng.normal(size=(6, 2))
    error = bound.continuous_rate(
        Reverse(data.denoiser, "x_0"), x_0, eps, np.full(6, 1.3), -np.ones(6)
    ).eps_error
    rest = error - jax.jit(control.__call__)(x_0, eps, np.full(6, 1.3))
    np.testing.assert_allclose(rest, rest[0], rtol=1e-9)


def _eigen(covariance):
    variances, basis = np.linalg.eigh(covariance)
    return np.log(variances), basis


def test_the_rest_of_x_0_is_as_the_conditional_normal_says(float64):
    """y is x_0 plus noise of variance 1/SNR: the ratio of p(x_j given the other y) to p(x_j)."""
    rng = np.random.default_rng(4)
    gaussian = GaussianControl.fit(rng.normal(size=(40, 3)) @ rng.normal(size=(3, 3)), 0.1)
    covariance = gaussian.basis * np.exp(gaussian.log_variance) @ gaussian.basis.T
    x, log_snr = rng.normal(size=3), 0.7
    slope, curvature = gaussian.expectation(x[None], np.array([log_snr]))
    noised = covariance + np.exp(-log_snr) * np.eye(3)
    for j in range(3):
        others = np.arange(3) != j
        gain = np.linalg.solve(noised[np.ix_(others, others)], covariance[others, j])
        mean = gaussian.mean[j] + gain @ (x - gaussian.mean)[others]
        variance = covariance[j, j] - gain @ covariance[others, j]
        alone = covariance[j, j]
        assert curvature[0, j] == pytest.approx(1 / variance - 1 / alone, rel=1e-9)
        expected = (mean - x[j]) / variance - (gaussian.mean[j] - x[j]) / alone
        assert slope[0, j] == pytest.approx(expected, rel=1e-9)
