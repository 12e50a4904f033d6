"""q: the chain composes to its marginal, and the posterior is Gaussian conditioning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import forward, schedules
from diffusion.schedules import Step
from tests.diffusion import oracles
from tests.diffusion.oracles import needs_long_double


def all_steps(levels):
    """Every step t = 1 … T, as a batch."""
    return levels.step(np.arange(1, levels.num_timesteps + 1))


@jax.jit
def transition_and_marginal(step):
    """q(x_t | x_s = 1) and q(x_t | x_0 = 1)."""
    one = jnp.ones((len(step.gap), 1))
    return forward.transition(one, step), forward.marginal(one, step.log_snr)


@pytest.mark.parametrize(
    ("schedule", "num_timesteps"),
    [
        (schedules.linear_beta(), 1000),
        (schedules.linear_beta(), 1),
        (schedules.cosine(), 2),
        (schedules.linear_log_snr(20.0, -20.0), 10),
        (schedules.linear_log_snr(10.0, -10.0), 10**5),
    ],
    ids=["ddpm", "T=1", "T=2", "T=10", "T=1e5"],
)
def test_transitions_compose_to_the_marginal(schedule, num_timesteps, float64):
    """Means multiply; each variance is carried through the squares of the later means."""
    levels = schedule.levels(num_timesteps)
    transition, marginal = transition_and_marginal(all_steps(levels))
    slope, noise = np.asarray(transition.mean)[:, 0], np.asarray(transition.variance)[:, 0]
    mean, variance = 1.0, 0.0
    composed = []
    for a, b in zip(slope, noise, strict=True):
        mean, variance = a * mean, a**2 * variance + b
        composed.append((mean, variance))
    mean, variance = np.transpose(composed)
    np.testing.assert_allclose(marginal.mean[:, 0], mean, rtol=1e-15 * (10 + num_timesteps))
    np.testing.assert_allclose(marginal.variance[:, 0], variance, rtol=1e-15 * (10 + num_timesteps))


def test_one_step_is_the_lectures_with_its_index_corrected(float64):
    chain = oracles.from_betas(np.linspace(1e-4, 0.02, 1000))
    transition, _ = transition_and_marginal(all_steps(schedules.linear_beta().levels(1000)))
    np.testing.assert_allclose(transition.mean[:, 0], np.sqrt(1 - chain.beta[1:]), rtol=1e-12)
    np.testing.assert_allclose(transition.variance[:, 0], chain.beta[1:], rtol=1e-10)


def test_trajectory_is_linear_in_its_noise_with_the_marginal_at_every_level(float64):
    """Row 0 carries x_0 alone and row j the noise of level j alone: exact moments, no sampling."""
    levels = schedules.linear_log_snr(8.0, -8.0).levels(6)
    rows = np.arange(7)[:, None]
    x_0 = (rows == 0).astype(float)
    path = forward.trajectory(x_0, levels, lambda t: jnp.asarray(rows == t[:, None], float))[..., 0]
    assert path.shape == (6, 7)
    np.testing.assert_allclose(path[:, 0], np.sqrt(levels.alpha_bar[1:]), rtol=1e-12)
    np.testing.assert_allclose((path[:, 1:] ** 2).sum(1), levels.sigma2[1:], rtol=1e-12)
    # Cov(x_s, x_t) = √(ᾱ_t/ᾱ_s) σ_s² for s ≤ t: the levels are those of one Markov chain.
    covariance = np.asarray(path[:, 1:] @ path[:, 1:].T)
    a, v = np.sqrt(levels.alpha_bar[1:]), levels.sigma2[1:]
    expected = np.tril(a[:, None] / a[None, :] * v[None, :])
    np.testing.assert_allclose(np.tril(covariance), expected, rtol=1e-10)


def test_sampled_trajectories_have_the_moments_of_the_marginal():
    n, levels = 4000, schedules.linear_beta().levels(5)
    noise = forward.example_noise(jax.random.key(0), np.arange(n), (1,))
    x_0 = np.full((n, 1), 1.5, np.float32)
    path = np.asarray(jax.jit(lambda: forward.trajectory(x_0, levels, noise))(), np.float64)[..., 0]
    mean, variance = 1.5 * np.sqrt(levels.alpha_bar[1:]), levels.sigma2[1:]
    # Standard errors of a normal sample's mean and variance; 5 levels, fixed seed, 4.5 of them.
    assert np.all(np.abs(path.mean(1) - mean) < 4.5 * np.sqrt(variance / n))
    assert np.all(np.abs(path.var(1) - variance) < 4.5 * variance * np.sqrt(2 / n))


@needs_long_double
@pytest.mark.parametrize(
    ("schedule", "num_timesteps", "tolerance"),
    [
        # The ratio of β̃ to its value at exact λ_s and λ_t is off by their rounding to float32: half
        # a unit in the last place, 2.4e-7 below 8 and 4.8e-7 below 16, for each of the two.
        (schedules.linear_log_snr(7.9, -7.9), 10, 1e-6),
        (schedules.linear_log_snr(7.9, -7.9), 10**6, 1e-6),
        (schedules.linear_beta(), 1000, 1.5e-6),
        (schedules.linear_beta(), 10**6, 1.5e-6),
        (schedules.cosine(), 4000, 1.5e-6),
    ],
    ids=["T=10", "T=1e6", "ddpm", "ddpm 1e6", "cosine 4000"],
)
def test_posterior_is_gaussian_conditioning(schedule, num_timesteps, tolerance):
    """N(x_s; α_s x_0, σ_s²) seen through x_t = √(1 − β) x_s + noise: precisions add."""
    levels = schedule.levels(num_timesteps)
    t = np.unique(np.geomspace(2, num_timesteps, 500).astype(int))
    rng = np.random.default_rng(1)
    x_0, x_t = rng.normal(size=(2, len(t), 1)).astype(np.float32)
    posterior = jax.jit(forward.posterior)(x_t, x_0, levels.step(t))
    chain = oracles.from_log_snr(levels.log_snr[1:])
    mean, variance = oracles.condition(
        prior_mean=np.sqrt(chain.previous[t]) * x_0[:, 0],
        prior_variance=1 - chain.previous[t],
        slope=np.sqrt(chain.alpha[t]),
        noise_variance=chain.beta[t],
        observed=x_t[:, 0],
    )
    np.testing.assert_allclose(posterior.variance[:, 0], variance.astype(float), rtol=tolerance)
    # Where the two parts of the mean cancel, the error is relative to them.
    parts = np.abs(chain.posterior_of_x_0[t] * x_0[:, 0]) + np.abs(
        chain.posterior_of_x_t[t] * x_t[:, 0]
    )
    assert np.all(np.abs(np.asarray(posterior.mean)[:, 0] - mean) <= tolerance * parts)


def test_posterior_is_the_lectures_formula(float64):
    chain = oracles.from_betas(np.linspace(1e-4, 0.02, 1000))
    step = all_steps(schedules.linear_beta().levels(1000))
    one, zero = np.ones((1000, 1)), np.zeros((1000, 1))
    of_x_t, of_x_0 = forward.posterior(one, zero, step), forward.posterior(zero, one, step)
    np.testing.assert_allclose(of_x_t.mean[1:, 0], chain.posterior_of_x_t[2:], rtol=1e-9)
    np.testing.assert_allclose(of_x_0.mean[:, 0], chain.posterior_of_x_0[1:], rtol=1e-9)
    np.testing.assert_allclose(of_x_0.variance[1:, 0], chain.posterior_variance[2:], rtol=1e-9)


def test_log_densities_satisfy_bayes_rule(float64):
    """(13.15–13.16): q(x_t|x_s) q(x_s|x_0) = q(x_s|x_t, x_0) q(x_t|x_0) at random points."""
    levels = schedules.linear_log_snr(15.0, -15.0).levels(40)
    step = levels.step(np.arange(2, 41))
    x_0, x_s, x_t = np.random.default_rng(2).normal(size=(3, 39, 2, 3))

    @jax.jit
    def both_sides(x_0, x_s, x_t, step):
        left = forward.transition(x_s, step).log_prob(x_t)
        left += forward.marginal(x_0, step.log_snr_s).log_prob(x_s)
        right = forward.posterior(x_t, x_0, step).log_prob(x_s)
        return left, right + forward.marginal(x_0, step.log_snr).log_prob(x_t)

    left, right = both_sides(x_0, x_s, x_t, step)
    # Log-densities reach −1e7 at the clean end, where x_t and x_s are far apart for their noise.
    np.testing.assert_allclose(left, right, rtol=1e-9)


def test_posterior_of_the_first_step_is_the_data_itself():
    """At s = 0 it is the point mass at x_0, and so are its sample and every gradient."""

    def sample(x_t, x_0, log_snr, gap):
        return forward.posterior(x_t, x_0, Step(log_snr, gap)).sample(jnp.ones_like(x_t))

    x_t, x_0 = np.random.default_rng(3).normal(size=(2, 4, 3)).astype(np.float32)
    log_snr = np.array([-20.0, 0.0, 9.2, 20.0], np.float32)
    gap = np.full(4, np.inf, np.float32)
    arguments = (x_t, x_0, log_snr, gap)
    np.testing.assert_array_equal(jax.jit(sample)(*arguments), x_0)
    gradients = jax.jit(jax.grad(lambda *of: sample(*of).sum(), (0, 1, 2, 3)))(*arguments)
    for gradient, expected in zip(gradients, (0, 1, 0, 0), strict=True):
        np.testing.assert_array_equal(gradient, np.full_like(gradient, expected))


@pytest.mark.parametrize("log_snr", [np.inf, 20.0, -20.0])
def test_diffuse_is_the_marginals_sample_up_to_the_data_itself(log_snr):
    rng = np.random.default_rng(4)
    x_0, eps = rng.normal(size=(2, 3, 2)).astype(np.float32)
    log_snr = np.full(3, log_snr, np.float32)
    x_t = forward.diffuse(x_0, log_snr, eps)
    np.testing.assert_allclose(
        x_t, forward.marginal(x_0, log_snr).sample(eps), atol=4 * oracles.EPS32
    )
    if np.isinf(log_snr[0]):
        np.testing.assert_array_equal(x_t, x_0)
        gradient = jax.grad(lambda l: forward.diffuse(x_0, l, eps).sum())(jnp.asarray(log_snr))
        np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (3, 7, 5, 3), (2,)])
def test_any_shape_of_numpy_arrays_goes_through(shape):
    """Coordinates are independent: an image is its pixels, each with its example's step."""
    rng = np.random.default_rng(5)
    x_0, x_t = rng.normal(size=(2, *shape)).astype(np.float32)
    log_snr = rng.uniform(-5, 5, shape[0]).astype(np.float32)
    step = Step(log_snr, np.full(shape[0], 0.5, np.float32))

    def everything(x_0, x_t, step):
        return (
            forward.marginal(x_0, step.log_snr).sample(x_t),
            forward.diffuse(x_0, step.log_snr, x_t),
            forward.transition(x_0, step).sample(x_t),
            forward.posterior(x_t, x_0, step).sample(x_t),
        )

    per_example = int(np.prod(shape[1:]))
    flat_step = Step(*(np.repeat(of, per_example) for of in step))
    flat = jax.jit(everything)(x_0.reshape(-1, 1), x_t.reshape(-1, 1), flat_step)
    for image, pixels in zip(everything(x_0, x_t, step), flat, strict=True):
        assert image.shape == shape
        np.testing.assert_allclose(image, pixels.reshape(shape), rtol=1e-6, atol=1e-7)


def test_noise_is_a_function_of_seed_example_time_and_draw_only():
    @functools.partial(jax.jit, static_argnames="draw")
    def rows(key, index, t, draw):
        return forward.example_noise(key, index, (2, 3), draw)(t)

    def row(seed=0, index=7, t=3, draw=0, batch=(7,)):
        at = np.full(len(batch), t)
        values = rows(jax.random.key(seed), np.array(batch), at, draw=draw)
        return np.asarray(values)[batch.index(index)]

    one = row()
    same = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    same(one, row(batch=(1, 7, 4)))
    same(one, row(batch=(4, 7)))
    others = [row(seed=1), row(index=8, batch=(8,)), row(t=4), row(draw=1)]
    for other in others:
        assert np.all(np.abs(other - one) > 1e-4)
    mixed = rows(jax.random.key(0), np.array([7, 7, 8]), np.array([3, 4, 3]), draw=0)
    for value, expected in zip(mixed, (one, row(t=4), row(index=8, batch=(8,))), strict=True):
        same(value, expected)


def test_noise_is_standard_normal_and_independent_across_examples_times_and_draws():
    n = 2000
    index = np.arange(n)

    @jax.jit
    def draw():
        first, second = (
            forward.example_noise(jax.random.key(1), index, (1,), draw=i) for i in (0, 1)
        )
        at = jnp.full(n, 5)
        return jnp.stack([first(at), first(at + 1), second(at)])[..., 0]

    values = np.asarray(draw(), np.float64)
    # Within 4.5 standard errors: z, z² and z⁴ have variances 1, 2 and 105 − 9.
    assert np.all(np.abs(values.mean(1)) < 4.5 / np.sqrt(n))
    assert np.all(np.abs(values.var(1) - 1) < 4.5 * np.sqrt(2 / n))
    assert np.all(np.abs((values**4).mean(1) - 3) < 4.5 * np.sqrt(96 / n))
    correlation = np.corrcoef(values)[np.triu_indices(3, 1)]
    neighbours = [np.corrcoef(row[1:], row[:-1])[0, 1] for row in values]
    assert np.all(np.abs([*correlation, *neighbours]) < 4.5 / np.sqrt(n))


def test_an_array_as_noise():
    """Row i of timestep t is eps[t, i], and a timestep that is not there is no number."""
    eps = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    noise = jax.jit(forward.array_noise(eps))
    np.testing.assert_array_equal(noise(np.array([0, 3, 1])), eps[[0, 3, 1], [0, 1, 2]])
    assert np.isnan(noise(np.array([4, 0, -1]))).all(axis=1).tolist() == [True, False, True]
