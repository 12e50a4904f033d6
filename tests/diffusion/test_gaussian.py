"""A diagonal Gaussian against scipy and against exact expectations of quadratics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffusion.gaussian import Gaussian
from tests.diffusion import oracles

SHAPE = (3, 2, 5, 1)


@pytest.fixture(params=["one variance per example", "one variance per coordinate"])
def pair(request, float64):
    """Two Gaussians of moderate scales; variances broadcast in the two ways that are in use."""
    rng = np.random.default_rng(0)
    shape = (3, 1, 1, 1) if request.param == "one variance per example" else SHAPE
    return [
        Gaussian(rng.normal(size=SHAPE), rng.uniform(0.1, 3.0, shape)) for _ in range(2)
    ], rng.normal(size=SHAPE)


def test_log_prob_entropy_and_sample_are_those_of_independent_normals(pair):
    (gaussian, _), x = pair
    std = np.broadcast_to(np.sqrt(gaussian.variance), SHAPE)
    normal = scipy.stats.norm(gaussian.mean, std)
    axes = (1, 2, 3)
    np.testing.assert_allclose(gaussian.log_prob(x), normal.logpdf(x).sum(axes), rtol=1e-12)
    np.testing.assert_allclose(gaussian.entropy(), normal.entropy().sum(axes), rtol=1e-12)
    np.testing.assert_allclose(scipy.stats.norm.cdf(x), normal.cdf(gaussian.sample(x)), rtol=1e-10)


def test_kl_is_the_expected_difference_of_log_densities(pair):
    """log p − log q is a sum of quadratics of one coordinate each, so ±1 are enough points."""
    (p, q), _ = pair
    expected = sum(
        p.log_prob(x) - q.log_prob(x) for x in (p.sample(sign * np.ones(SHAPE)) for sign in (-1, 1))
    )
    np.testing.assert_allclose(p.kl(q), expected / 2, rtol=1e-12)
    np.testing.assert_allclose(p.kl(p), 0, atol=1e-14)
    assert np.all(p.kl(q) > 0)


def test_kl_and_log_prob_in_closed_form():
    """KL(N(m, v) ‖ N(0, 1)) = ½(m² + v − 1 − log v); log N(0; m, v) by hand."""
    gaussian = Gaussian(np.array([[1.5], [0.0]], np.float32), np.array([[0.25], [1.0]], np.float32))
    standard = Gaussian(np.zeros((2, 1), np.float32), np.ones((2, 1), np.float32))
    # Some ten roundings to float32.
    tolerance = {"rtol": 10 * oracles.EPS32, "atol": 10 * oracles.EPS32}
    np.testing.assert_allclose(
        gaussian.kl(standard), [0.5 * (2.25 + 0.25 - 1 + np.log(4)), 0], **tolerance
    )
    np.testing.assert_allclose(
        gaussian.log_prob(np.zeros((2, 1), np.float32)),
        [-0.5 * (9 + np.log(np.pi / 2)), -0.5 * np.log(2 * np.pi)],
        **tolerance,
    )


def test_sample_and_its_gradient_at_variance_zero():
    def sample(mean, variance, eps):
        return Gaussian(mean, variance).sample(eps).sum()

    mean, variance = np.array([[1.0, -2.0]], np.float32), np.zeros((1, 1), np.float32)
    eps = np.array([[3.0, -5.0]], np.float32)
    value, gradients = jax.value_and_grad(sample, (0, 1, 2))(
        jnp.asarray(mean), jnp.asarray(variance), jnp.asarray(eps)
    )
    assert value == -1.0
    np.testing.assert_array_equal(gradients[0], np.ones((1, 2)))
    np.testing.assert_array_equal(gradients[1], np.zeros((1, 1)))
    np.testing.assert_array_equal(gradients[2], np.zeros((1, 2)))
