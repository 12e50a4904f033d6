"""Curves over t from the few timesteps of an evaluation to a target."""

import numpy as np
import pytest

from diffusion import schedules
from experiments.harness.evaluation.allocate import Allocated
from experiments.harness.evaluation.curves import allocated_curves


@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 1000])
def test_an_error_of_x_0_that_is_the_same_everywhere_stays_so(num_timesteps):
    """Then ‖ε − ε̂‖² follows the SNR, by a factor of e^0.4 from a bin to the next."""
    bins = min(32, max(num_timesteps - 1, 1))
    levels = schedules.linear_log_snr(8.0, -5.0).levels(num_timesteps)
    # Times in units of the KLs' share of (0, 1], on which λ is a straight line here.
    time = (np.arange(num_timesteps) - 0.5) / max(num_timesteps - 1, 1)
    middles = (np.arange(bins) + 0.5) / bins
    eps_error = 3.0 * np.exp(np.interp(middles, time, levels.log_snr[1:]))
    ones = np.ones((2, 4))
    allocated = Allocated(ones[0], ones, ones, np.arange(1.0, bins + 1), eps_error, 8)
    curves = allocated_curves(allocated, levels, num_dims=2)
    np.testing.assert_allclose(curves.eps_error * np.exp(-levels.log_snr[1:]), 3.0, rtol=1e-6)
    # The curve of the KL has the diffusion term for its sum.
    assert len(curves.kl) == num_timesteps - 1
    if num_timesteps > 1:
        assert curves.kl.sum() == pytest.approx(1 / (2 * np.log(2)), rel=1e-9)
