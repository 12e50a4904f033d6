"""Interpolation on the sphere, and through the noise of Gaussian data, where the flow is linear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from diffusion.exact import distributions
from diffusion.samplers import base, ddpm, interpolation, registry, solvers
from tests.diffusion import problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

MEAN, VARIANCE = np.array([0.3, -0.2, 0.0]), np.array([0.5, 1.0, 0.1])
NORMAL = distributions.normal(MEAN, np.diag(VARIANCE))
ENDS = 14.0, -9.0
X_A, X_B = MEAN + np.sqrt(VARIANCE) * np.random.default_rng(0).normal(size=(2, 4, 3))


def flat(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)


def angle(a, b):
    a, b = (flat(x) / np.linalg.norm(flat(x), axis=1, keepdims=True) for x in (a, b))
    return np.arccos((a * b).sum(axis=1))


def test_slerp_keeps_the_norm_and_divides_the_angle(float64):
    """Over all axes of an example, with a weight for each."""
    a, b = np.random.default_rng(1).normal(size=(2, 5, 4, 2, 3))
    a, b = (2.5 * (flat(x).T / np.linalg.norm(flat(x), axis=1)).T.reshape(x.shape) for x in (a, b))
    weight = np.linspace(0.1, 0.9, 5)
    between = interpolation.slerp(a, b, weight)
    np.testing.assert_allclose(np.linalg.norm(flat(between), axis=1), 2.5, rtol=1e-12)
    np.testing.assert_allclose(angle(a, between), weight * angle(a, b), rtol=1e-9)
    np.testing.assert_allclose(angle(between, b), (1 - weight) * angle(a, b), rtol=1e-9)
    np.testing.assert_array_equal(interpolation.slerp(a, b, 0.0), a)
    np.testing.assert_array_equal(interpolation.slerp(a, b, 1.0), b)


@pytest.mark.parametrize("distance", [0.0, 1e-30, 1e-6, 1e-4])
def test_slerp_of_nearly_parallel_vectors_is_their_line(distance):
    """The sphere is flat there, to second order; nothing is NaN, nor is a derivative."""
    a = np.random.default_rng(2).normal(size=(3, 6)).astype(np.float32)
    b = (a + distance * a[::-1]).astype(np.float32)

    def total(a, b, weight):
        between = interpolation.slerp(a, b, weight)
        return between.sum(), between

    gradients, between = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(a, b, 0.3)
    np.testing.assert_allclose(between, 0.7 * a + 0.3 * b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients[0], np.full((3, 6), 0.7), atol=1e-3)
    np.testing.assert_allclose(gradients[1], np.full((3, 6), 0.3), atol=1e-3)
    assert gradients[2] == pytest.approx(float((b - a).sum()), abs=1e-4)


def test_slerp_between_parallel_vectors_of_two_lengths_and_from_zero_is_finite():
    a = np.array([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], np.float32)
    b = np.array([[2.0, 4.0], [3.0, 1.0], [0.0, 0.0]], np.float32)
    between = np.asarray(interpolation.slerp(a, b, 0.25))
    np.testing.assert_allclose(between[0], [1.25, 2.5], rtol=1e-6)
    assert np.all(np.isfinite(between))


def interpolated(sampler, weights, num_timesteps):
    """Of the tests' data, with an encoder that has converged."""
    model = model_with(num_timesteps)
    decoder = registry.SAMPLERS[sampler](model)
    run = jax.jit(lambda: interpolation.interpolate(model, decoder, X_A, X_B, np.array(weights), 6))
    return np.asarray(run())


def model_with(num_timesteps):
    levels = schedules.linear_log_snr(*ENDS).levels(num_timesteps)
    return problems.without_decoder(problems.predicting(NORMAL, "v"), levels)


def test_of_normal_data_the_flow_is_linear_and_the_way_between_a_closed_form(float64):
    """z = α_T m + √(v_T/v) (x_0 − m) with v_T = α_T² v + σ_T²: encode, slerp, decode.

    DDIM misses the flow at first order, and twice the steps halve what it misses.
    """
    alpha_bar = 1 / (1 + np.exp(-ENDS[1]))
    scale = np.sqrt((alpha_bar * VARIANCE + 1 - alpha_bar) / VARIANCE)
    z_a, z_b = (np.sqrt(alpha_bar) * MEAN + scale * (x - MEAN) for x in (X_A, X_B))
    theta = angle(z_a, z_b)[:, None]
    weights, expected = (0.25, 0.8), []
    for w in weights:
        z = (np.sin((1 - w) * theta) * z_a + np.sin(w * theta) * z_b) / np.sin(theta)
        expected.append(MEAN + (z - np.sqrt(alpha_bar) * MEAN) / scale)
    coarse, fine = (np.abs(interpolated("ddim", weights, n) - expected).max() for n in (100, 200))
    assert fine < 1e-4
    assert coarse / fine == pytest.approx(2, rel=0.1)


def test_at_the_ends_each_image_is_what_it_is_encoded_and_decoded_to(float64):
    """With DDIM on both ways that is the image; a second-order decoder misses at first order."""
    first, last = interpolated("ddim", (0.0, 1.0), 100)
    np.testing.assert_allclose(first, X_A, atol=1e-5)
    np.testing.assert_allclose(last, X_B, atol=1e-5)

    model = model_with(100)
    other = solvers.dpm_solver_pp_2m(model)

    @jax.jit
    def there_and_back(x_0):
        x_T = ddpm.ddim_encode(model, x_0, 6)
        return base.sample(other, model.levels, jnp.zeros_like, 4, x_T=x_T).x_0

    first, last = interpolated("dpm_solver_pp_2m", (0.0, 1.0), 100)
    np.testing.assert_allclose(first, there_and_back(X_A), rtol=1e-9)
    np.testing.assert_allclose(last, there_and_back(X_B), rtol=1e-9)
    np.testing.assert_allclose(first, X_A, atol=0.1)


def test_a_sampler_that_draws_noise_is_refused():
    with pytest.raises(ValueError, match="draws no noise"):
        interpolated("ancestral", (0.5,), 3)
