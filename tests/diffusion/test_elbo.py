"""13.7–13.10: the bound is the ELBO, by a trajectory's log-densities one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import bound, decoders, forward, schedules
from diffusion.gaussian import Gaussian
from diffusion.model import DiffusionModel
from tests.diffusion import oracles, problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

BOTH = ["beta_tilde", "beta"]


def trajectory_estimate(model, x_0, noise):
    """−[log p(x_T) + Σ log p(x_{t−1}|x_t) − Σ log q(x_t|x_{t−1})], (13.10) sampled as it stands."""
    reverse, levels = model.reverse, model.levels
    path = jnp.concatenate([x_0[None], forward.trajectory(x_0, levels, noise)])
    batch = x_0.shape[0]
    end = Gaussian(jnp.zeros_like(x_0), jnp.ones_like(x_0))
    value = end.log_prob(path[-1])
    for t in range(1, levels.num_timesteps + 1):
        step = levels.step(np.full(batch, t))
        value -= forward.transition(path[t - 1], step).log_prob(path[t])
        x_0_hat = reverse.predict("x_0", path[t], step.log_snr)
        if t == 1:
            value += model.decoder(x_0, path[1], x_0_hat, levels)
        else:
            p = reverse.step(path[t], x_0_hat, step)
            value += p.log_prob(path[t - 1])
    return -value


@pytest.mark.parametrize("variance", BOTH)
def test_trajectory_estimate_has_the_bounds_mean(variance, float64):
    """On Gaussian data both are quadratics of normals, so sigma points give exact means.

    (13.10) takes its points in (T + 1) d dimensions, (13.26) in 2d: only the means agree.
    """
    levels = schedules.linear_log_snr(4.0, -5.0).levels(4)
    model = DiffusionModel(problems.imperfect(variance), decoders.gaussian(0.02), levels)
    long, short = oracles.sigma_points(10), oracles.sigma_points(4)
    along = long[:, 2:].reshape(-1, 4, 2).swapaxes(0, 1)

    @jax.jit
    def both():
        path = trajectory_estimate(
            model, jnp.asarray(long[:, :2]), lambda t: jnp.asarray(along)[t[0] - 1]
        )
        whole = bound.bound(model, jnp.asarray(short[:, :2]), problems.constant(short[:, 2:]))
        return path.mean(), whole.total.mean()

    path, whole = both()
    assert float(path) == pytest.approx(float(whole), rel=1e-10)
