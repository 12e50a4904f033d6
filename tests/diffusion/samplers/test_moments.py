"""Every sampler, with the exact denoiser of a normal and of a mixture, reaches the true moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion import schedules
from diffusion.exact import distributions
from diffusion.forward import example_noise
from diffusion.reverse import Reverse
from diffusion.samplers import base, registry
from tests.diffusion import problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

N = 4000
NORMAL = distributions.normal(np.array([0.3, -0.2]), np.array([[0.6, 0.3], [0.3, 0.5]]))
WEIGHTS, MEANS, STDS = (
    np.array([0.5, 0.3, 0.2]),
    np.array([-1.2, 0.4, 1.5]),
    np.array([0.3, 0.4, 0.2]),
)
MIXTURE = distributions.Mixture(WEIGHTS, MEANS[:, None], (STDS**2)[:, None, None])
OPTIONS = {
    "euler": {"churn": 0.05},
    "ddim": {"eta": 0.5},
    # With K = 4 r² × moves per unit of log-SNR = 71, a level's noise leaves an excess of 1/70. The
    # moves add r² times the variance of the last level's noise, which is e⁻⁹.
    "langevin": {"num_steps": 5, "snr": 0.4},
}


def draw(data, name, options):
    model = problems.without_decoder(Reverse(data.denoiser, "x_0"))
    # An adaptive solve takes its own steps between two levels; the others take one.
    num_timesteps = {"adaptive": 3, "langevin": 400}.get(name, 200)
    levels = schedules.linear_log_snr(9.0, -9.0).levels(num_timesteps)
    sampler = registry.SAMPLERS[name](model, **options)
    noise = example_noise(jax.random.key(3), jnp.arange(N), (data.means.shape[1],))
    run = functools.partial(base.sample, sampler, levels, noise, N)
    return np.asarray(jax.jit(lambda: run().x_0)(), np.float64)


def assert_within_sampling_error(found, expected, variance):
    """Four standard errors of a mean over N draws of the truth."""
    assert np.all(np.abs(found - expected) < 4 * np.sqrt(variance / N))


CASES = [(name, {}) for name in registry.SAMPLERS if name != "langevin"] + list(OPTIONS.items())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_mean_and_covariance_of_a_normal(name, options):
    x = draw(NORMAL, name, options)
    assert_within_sampling_error(x.mean(axis=0), NORMAL.mean, np.diag(NORMAL.covariance))
    variances = np.diag(NORMAL.covariance)
    # Isserlis: the variance of a product of two centred normals is v_i v_j + c_ij².
    of_products = np.outer(variances, variances) + NORMAL.covariance**2
    centred = x - NORMAL.mean
    assert_within_sampling_error(centred.T @ centred / N, NORMAL.covariance, of_products)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_moments_and_shares_of_a_mixture(name, options):
    """Its mean, its second moment, and how much of it lies to the left of two places."""
    x = draw(MIXTURE, name, options)[:, 0]
    mean, second = WEIGHTS @ MEANS, WEIGHTS @ (MEANS**2 + STDS**2)
    fourth = WEIGHTS @ (MEANS**4 + 6 * MEANS**2 * STDS**2 + 3 * STDS**4)
    assert_within_sampling_error(x.mean(), mean, second - mean**2)
    assert_within_sampling_error((x**2).mean(), second, fourth - second**2)
    for place in (-0.4, 1.0):
        share = WEIGHTS @ stats.norm.cdf((place - MEANS) / STDS)
        assert_within_sampling_error((x < place).mean(), share, share * (1 - share))
