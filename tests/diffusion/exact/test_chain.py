"""13.1: log p = ELBO + KL(q(z|x) ‖ p(z|x)), and each of the three against another way to it."""

import numpy as np
import pytest

from diffusion import bound, decoders, schedules
from diffusion.exact.chain import LinearGaussianChain
from diffusion.model import DiffusionModel
from tests.diffusion import oracles, problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

DECODER_VARIANCE = 0.05
X_0 = {
    "one coordinate": np.array([[0.8], [-1.7]]),
    "three coordinates": np.array([[0.8, -0.3, 1.9], [0.0, 2.0, -1.1]]),
}
every = [
    pytest.mark.parametrize("num_timesteps", [1, 2, 8]),
    pytest.mark.parametrize("variance", ["beta_tilde", "beta"]),
    pytest.mark.parametrize("x_0", list(X_0.values()), ids=list(X_0)),
]


def on_every_chain(test):
    """T, Σ_θ and x_0 as in the lists above."""
    for mark in every:
        test = mark(test)
    return test


def levels_of(num_timesteps):
    """From little noise to much, so that the prior's term counts too."""
    return schedules.linear_log_snr(5.0, -4.0).levels(num_timesteps)


def chain_of(num_timesteps, variance):
    """p of `problems.imperfect`: x̂_0 = 0.6 x_t + 0.1 + 0.02 λ_t."""
    levels = levels_of(num_timesteps)
    sigma = {"beta_tilde": levels.posterior_variance, "beta": levels.beta}[variance]
    offset = 0.1 + 0.02 * levels.log_snr[1:]
    gain = np.full(num_timesteps, 0.6)
    return LinearGaussianChain.from_denoiser(gain, offset, levels, sigma[2:], DECODER_VARIANCE)


def joint(chain):
    """Mean and covariance of (x_0 … x_T) under p, from x = M x + offset + noise."""
    size = len(chain.slope) + 1
    inverse = np.linalg.inv(np.eye(size) - np.diag(chain.slope, 1))
    noise = np.append(chain.variance, 1.0)
    return inverse @ np.append(chain.offset, 0.0), inverse @ np.diag(noise) @ inverse.T


def gaussian_kl(mean, covariance, other_mean, other_covariance):
    """KL of two multivariate normals."""
    precision = np.linalg.inv(other_covariance)
    shift = other_mean - mean
    log_dets = np.linalg.slogdet(other_covariance)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (
        np.trace(precision @ covariance) - len(mean) + shift @ precision @ shift + log_dets
    )


@on_every_chain
def test_elbo_and_gap_sum_to_the_log_likelihood(num_timesteps, variance, x_0):
    chain = chain_of(num_timesteps, variance)
    log_prob, gap = chain.log_prob(x_0), chain.gap(x_0)
    np.testing.assert_allclose(chain.elbo(x_0) + gap, log_prob, rtol=0, atol=1e-9)
    assert np.all(gap > 0.01)


@on_every_chain
def test_log_prob_and_gap_are_those_of_the_joint_normals(num_timesteps, variance, x_0):
    """Each coordinate's (x_0 … x_T) as one dense normal under p and one under q."""
    chain = chain_of(num_timesteps, variance)
    mean, covariance = joint(chain)
    expected = oracles.normal_log_prob(x_0, mean[0], covariance[0, 0]).sum(axis=1)
    np.testing.assert_allclose(chain.log_prob(x_0), expected, rtol=1e-9)

    # Under q, Cov(x_s, x_t) = √(ᾱ_t/ᾱ_s) σ_s² for s ≤ t.
    a, v = np.sqrt(chain.levels.alpha_bar[1:]), chain.levels.sigma2[1:]
    lower = np.tril(a[:, None] / a[None, :] * v[None, :])
    q_covariance = lower + np.tril(lower, -1).T
    gain = covariance[1:, 0] / covariance[0, 0]
    p_covariance = covariance[1:, 1:] - np.outer(gain, covariance[0, 1:])
    expected = [
        sum(
            gaussian_kl(a * x, q_covariance, mean[1:] + gain * (x - mean[0]), p_covariance)
            for x in row
        )
        for row in x_0
    ]
    np.testing.assert_allclose(chain.gap(x_0), expected, rtol=1e-9)


@on_every_chain
def test_elbo_is_minus_the_bound(num_timesteps, variance, x_0, float64):
    """Each of the bound's terms is a sum of quadratics of one normal: ±1 are enough points."""
    decoder = decoders.gaussian(DECODER_VARIANCE)
    model = DiffusionModel(problems.imperfect(variance), decoder, levels_of(num_timesteps))
    totals = [
        bound.bound(model, x_0, problems.constant(np.full_like(x_0, eps))).total
        for eps in (-1.0, 1.0)
    ]
    expected = -0.5 * (totals[0] + totals[1])
    np.testing.assert_allclose(
        chain_of(num_timesteps, variance).elbo(x_0), expected, rtol=1e-9, atol=1e-9
    )


def test_gap_is_never_negative():
    """Of a hundred chains drawn at random, over data from near the mean to far from it."""
    rng = np.random.default_rng(0)
    levels = schedules.linear_log_snr(8.0, -8.0).levels(5)
    x_0 = np.linspace(-5, 5, 11)[:, None]
    for _ in range(100):
        slope, offset = rng.normal(size=(2, 5))
        chain = LinearGaussianChain(slope, offset, rng.uniform(0.01, 2.0, 5), levels)
        log_prob, elbo, gap = chain.log_prob(x_0), chain.elbo(x_0), chain.gap(x_0)
        assert np.all(gap >= 0)
        # Both sides are sums of squares over variances, of up to 1e5 nats here.
        np.testing.assert_allclose(elbo + gap, log_prob, rtol=0, atol=1e-12 * np.abs(elbo).max())


@pytest.mark.parametrize("num_timesteps", [1, 2, 8])
def test_gap_vanishes_where_p_is_qs_own_reversal(num_timesteps):
    """For x_0 ~ N(0, 1), x_t ~ N(0, 1) at every t, so q(x_{t−1}|x_t) = N(√α_t x_t, β_t).

    The optimal x̂_0 = √ᾱ_t x_t makes √α_t of the posterior's mean, and Σ_θ = β_t is then exact.
    """
    levels = levels_of(num_timesteps)
    gain = np.sqrt(levels.alpha_bar[1:])
    chain = LinearGaussianChain.from_denoiser(
        gain, np.zeros(num_timesteps), levels, levels.beta[2:], levels.beta[1]
    )
    x_0 = np.linspace(-3, 3, 7)[:, None]
    np.testing.assert_allclose(chain.gap(x_0), 0, atol=1e-12)
    log_prob = oracles.normal_log_prob(x_0[:, 0], 0.0, 1.0)
    np.testing.assert_allclose(chain.elbo(x_0), log_prob, rtol=1e-12)
    np.testing.assert_allclose(chain.log_prob(x_0), log_prob, rtol=1e-12)


def test_a_hundred_thousand_steps_keep_the_identity():
    num_timesteps = 100_000
    levels = schedules.linear_log_snr(10.0, -10.0).levels(num_timesteps)
    chain = LinearGaussianChain.from_denoiser(
        0.9 * np.sqrt(levels.alpha_bar[1:]),
        np.full(num_timesteps, 0.05),
        levels,
        levels.posterior_variance[2:],
        1e-4,
    )
    x_0 = np.array([[0.4], [-1.5]])
    # c is 2e-4, so that differences of weights near one keep twelve digits.
    np.testing.assert_allclose(chain.elbo(x_0) + chain.gap(x_0), chain.log_prob(x_0), rtol=1e-9)


def test_variances_that_are_not_positive_are_refused():
    levels, ones = levels_of(3), np.ones(3)
    for variance, of_decoder, t in (([0.1, 0.0], 0.1, 3), ([0.1, 0.1], -1.0, 1)):
        with pytest.raises(ValueError, match=f"the variance at t = {t} is"):
            LinearGaussianChain.from_denoiser(ones, ones, levels, np.array(variance), of_decoder)
