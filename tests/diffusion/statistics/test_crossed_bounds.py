"""Differences of bounds whose truth is known: between two Σ_θ, and between two ways of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import bound, decoders, objectives, schedules
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from diffusion.statistics.crossed import crossed_mean
from tests.diffusion import problems

pytestmark = pytest.mark.usefixtures("quick_compiles")


def totals(model, x_0, noise):
    """The bound in nats of each example and draw, [n draws], with noise [draws n T+1 d]."""
    index = jnp.arange(len(x_0))

    def of_draw(noise):
        return bound.bound(model, x_0, problems.tabulated(noise, index), 100).total

    return jax.vmap(of_draw, out_axes=1)(noise)


def squared_errors(levels, variances):
    """E[(ε − ε̂)²] of the optimal denoiser at t = 1 … T for independent normal coordinates: [T d].

    It is SNR times the posterior variance of x_0: ᾱ v/(ᾱ v + σ²).
    """
    alpha_bar = levels.alpha_bar[1:, None]
    return alpha_bar * variances / (alpha_bar * variances + 1 - alpha_bar)


def test_the_difference_of_two_variances_has_calibrated_errors():
    """β̃ and β on the Gaussian testbed, same noise: 100 repetitions with 64 new examples each.

    The z-scores are Student's with 63 degrees of freedom, of variance 63/61. The mean of a hundred
    has a standard error of 0.10 and their variance one of 0.14: within 3 and 2 of these.
    """
    data, n = problems.testbed(), 64
    levels = schedules.linear_log_snr(6.0, -6.0).levels(10)
    models = [
        DiffusionModel(problems.predicting(data, "eps", name), data.decoder(), levels)
        for name in ("beta_tilde", "beta")
    ]

    @jax.jit
    @jax.vmap
    def measure(key):
        keys = jax.random.split(key)
        x_0, noise = data.sample(keys[0], n), jax.random.normal(keys[1], (2, n, 11, 4))
        return jnp.stack([totals(model, x_0, noise) for model in (*models, models[1])])

    measured = measure(jax.random.split(jax.random.key(0), 100))
    first, second, again = np.moveaxis(np.asarray(measured, np.float64), 1, 0)
    np.testing.assert_array_equal(second, again)
    # E of r + expm1(−r) + (e^{−r} − 1) expm1(gap) e, halved and summed over t ≥ 2 and coordinates.
    error = squared_errors(levels, np.diag(data.covariance))[1:]
    step = levels.step(np.arange(2, 11))
    r = np.asarray(step.log_beta_ratio, np.float64)[:, None]
    gap = np.asarray(step.gap, np.float64)[:, None]
    truth = 0.5 * np.sum(r + np.expm1(-r) + np.expm1(-r) * np.expm1(gap) * error)
    results = [crossed_mean(difference[None]) for difference in second - first]
    z = np.array([(result.mean - truth) / result.se for result in results])
    assert abs(z.mean()) < 3 * np.sqrt(63 / 61 / 100)
    assert z.var(ddof=1) == pytest.approx(1, abs=0.28)
    # The difference is known far better than either bound.
    assert np.mean([result.se for result in results]) < 0.7 * crossed_mean(first[:1]).se


VARIANCES = np.array([1.0, 0.1])
LEVELS = schedules.linear_log_snr(3.0, -3.0).levels(5)
DECODER_VARIANCE = 0.05
NUM_STEPS, BATCH_SIZE = 30, 8


def linear_model(weights):
    """ε̂ = w x_t with a weight for each level and coordinate: [T d]."""

    def denoiser(x_t, log_snr, condition=None):
        t = jnp.argmin(jnp.abs(log_snr[:, None] - LEVELS.log_snr[1:]), axis=1)
        return weights[t] * x_t

    return DiffusionModel(
        Reverse(denoiser, "eps", "beta_tilde"), decoders.gaussian(DECODER_VARIANCE), LEVELS
    )


def draw(key, n):
    return jax.random.normal(key, (n, 2)) * np.sqrt(VARIANCES)


def train(key, learning_rate):
    """Weights after a few steps of SGD on L_simple; a seed has its start, examples and noise."""

    def step(weights, key):
        keys = jax.random.split(key, 3)
        x_0, eps = draw(keys[0], BATCH_SIZE), jax.random.normal(keys[1], (BATCH_SIZE, 2))
        t = jax.random.randint(keys[2], (BATCH_SIZE,), 1, LEVELS.num_timesteps + 1)

        def loss(weights):
            return objectives.simple().discrete(linear_model(weights), x_0, eps, t).term.mean()

        return weights - learning_rate * jax.grad(loss)(weights), None

    keys = jax.random.split(key, NUM_STEPS + 1)
    start = 0.3 * jax.random.normal(keys[0], (LEVELS.num_timesteps, 2))
    return jax.lax.scan(step, start, keys[1:])[0]


def expected_bound(weights):
    """E of the bound without its prior, from E[(ε − w x_t)²] = (1 − w σ)² + w² ᾱ v: [T d] -> []."""
    alpha_bar = LEVELS.alpha_bar[1:, None]
    error = (1 - weights * np.sqrt(1 - alpha_bar)) ** 2 + weights**2 * alpha_bar * VARIANCES
    factors = 0.5 * np.expm1(LEVELS.gap[1:, None])
    factors[0] = 0.5 * (1 - alpha_bar[0]) / alpha_bar[0] / DECODER_VARIANCE
    return np.sum(factors * error, axis=(-2, -1))


RATES = (0.2, 0.6)


@pytest.fixture(scope="module")
def truth():
    """The difference between two learning rates over 4000 training seeds, in closed form each."""
    train_all = jax.jit(jax.vmap(lambda key: jnp.stack([train(key, rate) for rate in RATES])))
    weights = np.asarray(train_all(jax.random.split(jax.random.key(1), 4000)), np.float64)
    differences = expected_bound(weights[:, 1]) - expected_bound(weights[:, 0])
    return differences.mean()


def test_three_training_seeds_cover_the_truth_as_often_as_they_say(truth):
    """95 % of 400 intervals, within 3.5 standard errors of a binomial count."""
    n = 30

    @jax.jit
    @jax.vmap
    def measure(key):
        keys = jax.random.split(key, 3)
        x_0, noise = draw(keys[0], n), jax.random.normal(keys[1], (2, n, 6, 2))

        def of_seed(key):
            first, second = (totals(linear_model(train(key, rate)), x_0, noise) for rate in RATES)
            return second - first

        return jax.vmap(of_seed)(jax.random.split(keys[2], 3))

    differences = np.asarray(measure(jax.random.split(jax.random.key(2), 400)), np.float64)
    results = [crossed_mean(difference - truth) for difference in differences]
    error = 3.5 * np.sqrt(0.05 * 0.95 / 400)
    assert coverage(results) == pytest.approx(0.95, abs=error)
    # Seeds and examples both matter here: an error over the examples alone is too small.
    alone = [
        crossed_mean(difference.mean(axis=0, keepdims=True) - truth) for difference in differences
    ]
    assert coverage(alone) < 0.95 - 2 * error
    # The square of the error is the variance of the mean, within 4 standard errors of the latter.
    ratio = np.mean([result.se**2 for result in results]) / np.var([r.mean for r in results])
    assert ratio == pytest.approx(1, abs=4 * np.sqrt(2 / 400))


def coverage(results):
    """The share of 95 % intervals that contain zero."""
    return np.mean([result.p_value >= 0.05 for result in results])
