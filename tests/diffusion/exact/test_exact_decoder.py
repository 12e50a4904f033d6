"""p(x_0 | x_1) of known distributions: against quadrature, scipy and the chain rule of entropy."""

import numpy as np
import pytest
import scipy.special
import scipy.stats

from diffusion import bound, schedules
from diffusion.model import DiffusionModel
from tests.diffusion import oracles, problems
from tests.diffusion.problems import DISCRETE, NORMAL

pytestmark = pytest.mark.usefixtures("quick_compiles")


def levels_at(log_snr):
    """One noisy level."""
    return schedules.Levels.from_log_snr(np.array([log_snr]))


@pytest.mark.parametrize("log_snr", [-8.0, 0.0, 4.0])
def test_true_decoder_is_a_density_of_x_0_with_the_denoisers_mean(log_snr, float64):
    """∫ p(x_0 | x_1) dx_0 = 1 and ∫ x_0 p(x_0 | x_1) dx_0 = E[x_0 | x_1], by the trapezoid rule."""
    data, step = problems.mixture(3, 1), 0.02
    x_0 = np.arange(-8, 8, step)[:, None]
    for value in (-1.0, 0.0, 2.0):
        x_1 = np.full_like(x_0, value)
        density = np.exp(data.decoder()(x_0, x_1, np.nan * x_0, levels_at(log_snr)))
        assert density.shape == (len(x_0),)
        assert density.sum() * step == pytest.approx(1, rel=1e-9)
        mean = float(data.denoiser(x_1[:1], np.array([log_snr]))[0, 0])
        assert density @ x_0[:, 0] * step == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("log_snr", [-20.0, 0.0, 3.0, 20.0])
def test_true_decoder_of_a_normal_is_its_conditional_normal(log_snr, float64):
    """N(E[x_0 | x_1], (C⁻¹ + SNR I)⁻¹)."""
    rng = np.random.default_rng(7)
    snr = np.exp(log_snr)
    covariance = np.linalg.inv(np.linalg.inv(NORMAL.covariance) + snr * np.eye(3))
    x_1 = rng.normal(size=(4, 3))
    mean = np.asarray(NORMAL.denoiser(x_1, np.full(4, log_snr)))
    x_0 = mean + rng.normal(size=(4, 3)) @ np.linalg.cholesky(covariance).T
    expected = [
        scipy.stats.multivariate_normal(m, covariance).logpdf(x)
        for m, x in zip(mean, x_0, strict=True)
    ]
    actual = NORMAL.decoder()(x_0, x_1, mean, levels_at(log_snr))
    # log q takes x_1 from α x_0, which at λ = 20 are σ = 5e-5 apart: twelve digits are left.
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("log_snr", [-20.0, 0.0, 3.0, 20.0])
def test_true_decoder_of_points_sums_to_one(log_snr, float64):
    rng = np.random.default_rng(8)
    alpha, sigma = np.sqrt(scipy.special.expit([log_snr, -log_snr]))
    x_1 = alpha * DISCRETE.means + sigma * rng.normal(size=(6, 3))
    every_pair = np.repeat(DISCRETE.means, 6, axis=0), np.tile(x_1, (6, 1))
    log_prob = DISCRETE.decoder()(*every_pair, every_pair[0], levels_at(log_snr))
    prob = np.exp(log_prob).reshape(6, 6)
    np.testing.assert_allclose(prob.sum(axis=0), 1, rtol=1e-9)
    means = DISCRETE.denoiser(x_1, np.full(6, log_snr))
    np.testing.assert_allclose(prob.T @ DISCRETE.means, means, rtol=1e-9, atol=1e-12)
    elsewhere = DISCRETE.decoder()(DISCRETE.means + 0.01, x_1, x_1, levels_at(log_snr))
    np.testing.assert_array_equal(elsewhere, -np.inf)


@pytest.mark.parametrize("log_snr", [-4.0, 0.0, 4.0])
def test_bound_of_the_true_decoder_exceeds_the_entropy_by_the_priors_error(log_snr, float64):
    """At T = 1, E[bound] = H(x_0) + KL(p(x_1) ‖ N(0, I)): the chain rule of entropy.

    All is quadratic in (x_0, ε), so sigma points give the mean.
    """
    points = oracles.sigma_points(6)
    x_0 = NORMAL.mean + points[:, :3] @ np.linalg.cholesky(NORMAL.covariance).T
    model = DiffusionModel(problems.predicting(NORMAL, "x_0"), NORMAL.decoder(), levels_at(log_snr))
    total = bound.bound(model, x_0, problems.constant(points[:, 3:])).total
    alpha_bar = scipy.special.expit(log_snr)
    covariance = alpha_bar * NORMAL.covariance + (1 - alpha_bar) * np.eye(3)
    squared = np.trace(covariance) + alpha_bar * NORMAL.mean @ NORMAL.mean
    prior_error = 0.5 * (squared - 3 - np.linalg.slogdet(covariance)[1])
    assert float(total.mean()) == pytest.approx(NORMAL.entropy() + prior_error, rel=1e-10)
