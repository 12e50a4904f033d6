"""13.1 and 13.7–13.10: the bound is the ELBO, by a trajectory's log-densities and by its gap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import bound, decoders, exact, forward, schedules
from diffusion.gaussian import Gaussian
from tests.diffusion import oracles, problems

BOTH = ["beta_tilde", "beta"]


# 13.10: the bound along a trajectory


def trajectory_estimate(model, decoder, x_0, levels, noise):
    """−[log p(x_T) + Σ log p(x_{t−1}|x_t) − Σ log q(x_t|x_{t−1})], (13.10) sampled as it stands."""
    path = jnp.concatenate([x_0[None], forward.trajectory(x_0, levels, noise)])
    batch = x_0.shape[0]
    end = Gaussian(jnp.zeros_like(x_0), jnp.ones_like(x_0))
    value = end.log_prob(path[-1])
    for t in range(1, levels.num_timesteps + 1):
        step = levels.step(np.full(batch, t))
        value -= forward.transition(path[t - 1], step).log_prob(path[t])
        x_0_hat = model.predict("x_0", path[t], step.log_snr)
        if t == 1:
            value += decoder(x_0, path[1], x_0_hat, levels)
        else:
            p = model.step(path[t], x_0_hat, step)
            value += p.log_prob(path[t - 1])
    return -value


@pytest.mark.parametrize("variance", BOTH)
def test_trajectory_estimate_has_the_bounds_mean(variance, float64):
    """On Gaussian data both are quadratics of normals, so sigma points give exact means.

    (13.10) takes its points in (T + 1) d dimensions, (13.26) in 2d: only the means agree.
    """
    levels = schedules.linear_log_snr(4.0, -5.0).levels(4)
    model, decoder = problems.imperfect(variance), decoders.gaussian(0.02)
    long, short = oracles.sigma_points(10), oracles.sigma_points(4)
    along = long[:, 2:].reshape(-1, 4, 2).swapaxes(0, 1)

    @jax.jit
    def both():
        path = trajectory_estimate(
            model, decoder, jnp.asarray(long[:, :2]), levels, lambda t: jnp.asarray(along)[t[0] - 1]
        )
        whole = bound.bound(
            model, decoder, jnp.asarray(short[:, :2]), levels, problems.constant(short[:, 2:])
        )
        return path.mean(), whole.total.mean()

    path, whole = both()
    assert float(path) == pytest.approx(float(whole), rel=1e-10)


def test_sampled_trajectories_have_the_bounds_mean_within_standard_error():
    n, levels = 20_000, schedules.linear_log_snr(4.0, -5.0).levels(5)
    data = exact.NormalData(np.array([0.2, -0.3], np.float32), np.diag([1.0, 0.2]).astype("f4"))
    model, decoder = problems.predicting(data, "eps"), decoders.gaussian(0.02)

    rng = np.random.default_rng(0)
    x_0 = (data.mean + rng.normal(size=(n, 2)) @ np.sqrt(data.covariance)).astype(np.float32)
    tables = rng.normal(size=(2, n, 6, 2)).astype(np.float32)

    @jax.jit
    def both(x_0, tables):
        noises = [problems.tabulated(table, np.arange(n)) for table in tables]
        return (
            trajectory_estimate(model, decoder, x_0, levels, noises[0]),
            bound.bound(model, decoder, x_0, levels, noises[1]).total,
        )

    path, whole = (np.asarray(value, np.float64) for value in both(x_0, tables))
    difference = path - whole  # the same x_0, other noise
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(n)
    # Leaving the 2π out of one log-density would shift the mean by 1.8 nats.
    assert difference.std() / np.sqrt(n) < 0.08


# 13.1: log p = ELBO + KL(q(z|x) ‖ p(z|x))


def gaussian_kl(mean, covariance, other_mean, other_covariance):
    """KL of two multivariate normals."""
    precision = np.linalg.inv(other_covariance)
    shift = other_mean - mean
    log_dets = np.linalg.slogdet(other_covariance)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (
        np.trace(precision @ covariance) - len(mean) + shift @ precision @ shift + log_dets
    )


@pytest.mark.parametrize("variance", BOTH)
@pytest.mark.parametrize("num_timesteps", [1, 2, 8])
def test_elbo_and_its_gap_sum_to_the_log_likelihood(num_timesteps, variance, float64):
    """A linear-Gaussian chain in one dimension: all three are closed forms of its joint normal."""
    x, of_decoder = 0.8, 0.05
    levels = schedules.linear_log_snr(5.0, -4.0).levels(num_timesteps)
    model = problems.imperfect(variance)

    # p's steps are affine in x_t: two points of each give slope and offset.
    t = np.arange(1, num_timesteps + 1)
    ends = []
    for value in (0.0, 1.0):
        at = np.full((num_timesteps, 1), value)
        x_0_hat = model.predict("x_0", at, levels.log_snr[1:])
        p = model.step(at, x_0_hat, levels.step(t))
        ends.append(np.where(t == 1, x_0_hat[:, 0], p.mean[:, 0]))
    slope, offset = ends[1] - ends[0], ends[0]
    noise = np.where(t == 1, of_decoder, np.asarray(p.variance)[:, 0])

    # The joint normal of (x_0, x_1 … x_T) under p: x = M x + offset + noise, from x_T ~ N(0, 1).
    size = num_timesteps + 1
    inverse = np.linalg.inv(np.eye(size) - np.diag(slope, 1))
    mean = inverse @ np.append(offset, 0.0)
    covariance = inverse @ np.diag(np.append(noise, 1.0)) @ inverse.T
    log_likelihood = oracles.normal_log_prob(x, mean[0], covariance[0, 0])
    gain = covariance[1:, 0] / covariance[0, 0]
    p_mean = mean[1:] + gain * (x - mean[0])
    p_covariance = covariance[1:, 1:] - np.outer(gain, covariance[0, 1:])

    # The joint normal of (x_1 … x_T) under q: Cov(x_s, x_t) = √(ᾱ_t/ᾱ_s) σ_s² for s ≤ t.
    a, v = np.sqrt(levels.alpha_bar[1:]), levels.sigma2[1:]
    lower = np.tril(a[:, None] / a[None, :] * v[None, :])
    q_covariance = lower + np.tril(lower, -1).T
    gap = gaussian_kl(a * x, q_covariance, p_mean, p_covariance)

    # Each of the bound's terms is a quadratic of one normal: ±1 are enough points.
    noise = problems.constant(np.array([[-1.0], [1.0]]))
    decoder = decoders.gaussian(of_decoder)
    minus_elbo = bound.bound(model, decoder, np.full((2, 1), x), levels, noise).total.mean()
    assert gap > 0.01
    assert -float(minus_elbo) + gap == pytest.approx(log_likelihood, abs=1e-9)
