"""What the continuous-time bound asks of a schedule, on schedules whose slopes are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.learned_schedule import diffusion_term, value_and_slope, variance_surrogate
from tests.diffusion import oracles, problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

MAX, MIN = 4.0, -3.0
WIGGLES = [(0.0, 0.0, 0.0), (0.4, -0.3, 0.2), (-0.7, 0.1, 0.15)]


def waves(time):
    """sin(kπu)/kπ for k = 1, 2, 3: zero at both ends."""
    frequency = jnp.pi * jnp.arange(1, 4)
    return jnp.sin(frequency * time[:, None]) / frequency


def wiggly(eta):
    """λ = MAX − (MAX − MIN)(u + Σ η_k sin(kπu)/kπ): it falls if Σ|η| < 1, between fixed ends."""

    def schedule_fn(time):
        return MAX - (MAX - MIN) * (time + waves(time) @ jnp.asarray(eta))

    return schedule_fn


def root_h(log_snr):
    """√h: a bump on a slope, so that a schedule is better at one place than at another."""
    return 0.3 + jnp.exp(-0.5 * (log_snr - 1.0) ** 2) + 0.05 * log_snr**2


def midpoints(n: int):
    """Equally spaced times; the mean over them is the integral, to O(1/n²)."""
    return (np.arange(n) + 0.5) / n


def gauss(n: int):
    """Gauss–Legendre times and weights on [0, 1]: exact to rounding for smooth integrands."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return 0.5 * (nodes + 1), 0.5 * weights


@pytest.mark.parametrize("eta", WIGGLES)
def test_slope(float64, eta):
    time = midpoints(50)
    log_snr, slope = value_and_slope(wiggly(eta), time)
    np.testing.assert_array_equal(log_snr, wiggly(eta)(jnp.asarray(time)))
    expected = -(MAX - MIN) * (1 + np.cos(np.pi * np.arange(1, 4) * time[:, None]) @ np.array(eta))
    np.testing.assert_allclose(slope, expected, rtol=1e-13)


@pytest.mark.parametrize("eta", WIGGLES)
def test_diffusion_term_is_the_information_between_the_ends(float64, eta):
    """At the optimal denoiser it is I(λ_max) − I(λ_min) in nats, whatever the interior (I-MMSE)."""
    data = problems.testbed()
    model = problems.predicting(data, "x_0")
    # The error is quadratic in (x_0, ε), so these points give its exact mean.
    points = oracles.sigma_points(8)
    x_0 = points[:, :4] * np.sqrt(np.diag(np.asarray(data.covariance, np.float64)))
    eps = points[:, 4:]

    def mean_term(time):
        log_snr, slope = value_and_slope(wiggly(eta), time[None])
        level = jnp.broadcast_to(log_snr, len(points))
        error = model.squared_eps_error(jnp.asarray(x_0), jnp.asarray(eps), level)
        return diffusion_term(slope, 0.5 * error.sum(axis=1).mean()[None])[0]

    time, weights = gauss(60)
    total = weights @ jax.lax.map(jax.jit(mean_term), jnp.asarray(time))
    expected = data.mutual_information(MAX) - data.mutual_information(MIN)
    # The smallest variance of the testbed, 1/100, is rounded to float32.
    np.testing.assert_allclose(total, expected, rtol=1e-7)


@pytest.mark.parametrize("eta", WIGGLES)
def test_surrogate_has_the_gradient_of_the_variance(float64, eta):
    """Against autodiff of ∫ h λ'² du, which, unlike the surrogate, goes through h(λ(u))."""
    spread = jnp.array([0.5, 1.5])  # e is random given λ: h = E[spread²] root_h²

    def second_moment(eta):
        time, weights = gauss(200)
        log_snr, slope = value_and_slope(wiggly(eta), time)
        h = jnp.mean(spread**2) * root_h(log_snr) ** 2
        return weights @ (h * slope**2)

    def surrogate(eta):
        time = jnp.tile(midpoints(2**13), 2)
        half_error = jnp.repeat(spread, 2**13) * root_h(wiggly(eta)(time))
        return variance_surrogate(wiggly(eta), time, half_error).mean()

    eta = jnp.array(eta)
    time, weights = gauss(200)
    mean = weights @ diffusion_term(
        value_and_slope(wiggly(eta), time)[1], root_h(wiggly(eta)(jnp.asarray(time)))
    )
    value, gradient = jax.jit(jax.value_and_grad(surrogate))(eta)
    # Tolerance: the midpoint rule, whose error is about |f'|/(24 n²) with n = 8192.
    np.testing.assert_allclose(value * mean**2, second_moment(eta), rtol=1e-7)
    expected = jax.grad(second_moment)(eta)
    np.testing.assert_allclose(gradient * mean**2, expected, atol=1e-7 * np.abs(expected).max())


def test_the_best_schedule_makes_every_draw_alike(float64):
    """√h = 1/(1 + λ²) is integrated by atan, so λ(u) = tan(…) is best: L is constant there."""
    start, end = np.arctan(MAX), np.arctan(MIN)

    def bent(eta):
        def schedule_fn(time):
            return jnp.tan(start + (end - start) * (time + waves(time) @ eta))

        return schedule_fn

    def surrogate(eta, time):
        half_error = 1 / (1 + bent(eta)(time) ** 2)
        return variance_surrogate(bent(eta), time, half_error)

    best, time = jnp.zeros(3), jnp.asarray(midpoints(2**12))
    np.testing.assert_allclose(surrogate(best, time), 1.0, rtol=1e-12)
    gradient = jax.grad(lambda eta: surrogate(eta, time).mean())
    # The gradient of one draw is of order one; of the mean only the midpoint rule's error is left.
    np.testing.assert_allclose(gradient(best), 0.0, atol=1e-6)
    worse = jnp.array([0.0, 0.2, 0.0])
    assert gradient(worse)[1] > 0.1
    assert surrogate(worse, time).mean() > 1.001


def test_surrogate_does_not_see_the_scale_of_the_data():
    time = jnp.asarray(midpoints(64), jnp.float32)
    half_error = root_h(wiggly(WIGGLES[1])(time))

    def gradient(factor):
        return jax.grad(
            lambda eta: variance_surrogate(wiggly(eta), time, factor * half_error).mean()
        )(jnp.array(WIGGLES[1]))

    # A power of two multiplies without rounding, and so it divides out.
    np.testing.assert_array_equal(gradient(2.0**40), gradient(1.0))


def test_surrogate_leaves_the_denoiser_alone():
    time = jnp.asarray(midpoints(8), jnp.float32)
    gradient = jax.grad(lambda e: variance_surrogate(wiggly(WIGGLES[1]), time, e).mean())
    np.testing.assert_array_equal(gradient(1 + time), np.zeros(8))


def test_no_error_is_no_variance():
    time = jnp.asarray(midpoints(8), jnp.float32)

    def surrogate(eta):
        return variance_surrogate(wiggly(eta), time, jnp.zeros(8)).mean()

    value, gradient = jax.value_and_grad(surrogate)(jnp.array(WIGGLES[1]))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(3))
