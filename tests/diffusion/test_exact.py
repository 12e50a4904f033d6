"""Closed-form denoisers and likelihoods against other closed forms, in float64."""

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats

from diffusion.exact import DiscreteData, NormalData
from tests.diffusion import oracles

RNG = np.random.default_rng(0)
FACTOR = RNG.normal(size=(3, 3))
NORMAL = NormalData(np.array([0.5, -1.0, 2.0]), FACTOR @ FACTOR.T + 0.1 * np.eye(3))
DISCRETE = DiscreteData(RNG.integers(-4, 5, (6, 3)) / 4)
LOG_SNR = np.linspace(-20, 20, 81)
SNR = np.exp(LOG_SNR)
ALPHA, SIGMA = np.sqrt(SNR / (1 + SNR)), np.sqrt(1 / (1 + SNR))


def noisy(data):
    """x_t at every log-SNR, as its marginal has it."""
    x_0 = np.asarray(data.sample(jax.random.key(0), len(LOG_SNR)), np.float64)
    return ALPHA[:, None] * x_0 + SIGMA[:, None] * np.random.default_rng(1).normal(size=x_0.shape)


def normal_oracle(x_t):
    """Precisions add: (C⁻¹ + SNR I)⁻¹ (C⁻¹ m + α/σ² x_t)."""
    precision = np.linalg.inv(NORMAL.covariance)
    return np.stack(
        [
            np.linalg.solve(precision + r * np.eye(3), precision @ NORMAL.mean + a / s**2 * x)
            for x, a, s, r in zip(x_t, ALPHA, SIGMA, SNR, strict=True)
        ]
    )


def discrete_oracle(x_t):
    """A softmax of the six log-densities of x_t."""
    log_density = scipy.stats.norm.logpdf(
        x_t[:, None], ALPHA[:, None, None] * DISCRETE.points, SIGMA[:, None, None]
    ).sum(-1)
    return scipy.special.softmax(log_density, axis=1) @ DISCRETE.points


@pytest.mark.parametrize(
    ("data", "oracle"),
    [(NORMAL, normal_oracle), (DISCRETE, discrete_oracle)],
    ids=["normal", "discrete"],
)
def test_denoiser_is_the_conditional_mean(data, oracle):
    x_t = noisy(data)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            jax.jit(data.denoiser)(x_t, LOG_SNR), oracle(x_t), rtol=1e-7, atol=1e-9
        )
    rounded = type(data)(*(np.float32(of) for of in data))
    x_t = np.float32(x_t)
    actual = np.asarray(jax.jit(rounded.denoiser)(x_t, np.float32(LOG_SNR)))
    assert actual.dtype == np.float32
    # A prediction of the size of the data, by sums of a few of its products.
    error = np.abs(actual - oracle(np.float64(x_t)))
    assert np.all(error < 1e-5), f"{error.max():.1e} at λ = {LOG_SNR[error.max(1).argmax()]}"


def test_normal_log_prob_and_information():
    x = np.random.default_rng(2).normal(size=(5, 3))
    expected = scipy.stats.multivariate_normal(NORMAL.mean, NORMAL.covariance).logpdf(x)
    data = NormalData(*(np.float32(of) for of in NORMAL))
    np.testing.assert_allclose(data.log_prob(np.float32(x)), expected, rtol=1e-4)
    for log_snr in (-20.0, 0.0, 20.0):
        _, log_det = np.linalg.slogdet(np.eye(3) + np.exp(log_snr) * NORMAL.covariance)
        assert NORMAL.mutual_information(log_snr) == pytest.approx(0.5 * log_det, rel=1e-6)


def test_normal_samples_have_its_moments():
    n = 4000
    x = np.asarray(NORMAL.sample(jax.random.key(1), n), np.float64)
    covariance = NORMAL.covariance
    variances = np.diag(covariance)
    assert np.all(np.abs(x.mean(0) - NORMAL.mean) < 4 * np.sqrt(variances / n))
    # Var of a sample covariance: (C_ii C_jj + C_ij²)/n.
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / n)
    assert np.all(np.abs(np.cov(x.T) - covariance) < 4 * error)


def test_discrete_log_prob_and_samples():
    data = DiscreteData(np.float32(DISCRETE.points))
    np.testing.assert_allclose(data.log_prob(data.points), -np.log(6), rtol=oracles.EPS32)
    off = data.points + np.float32([[0.0, 0.0, 1e-3]])
    np.testing.assert_array_equal(data.log_prob(off), np.full(6, -np.inf))
    x = np.asarray(data.sample(jax.random.key(2), 3000))
    counts = [np.all(x == point, axis=1).sum() for point in data.points]
    assert sum(counts) == 3000
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
