"""The control variate: of mean zero for every x_0, and all of the noise where data are Gaussian."""

import jax
import numpy as np
import pytest

from diffusion import bound
from diffusion.exact import distributions
from diffusion.reverse import Reverse
from diffusion.statistics.control import GaussianControl
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
