"""Losses: weightings of the per-timestep KL, unbiased for their sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import bound, decoders, objectives, reverse, schedules
from diffusion.reverse import Reverse
from tests.diffusion import problems

QUANTIZATION = decoders.Quantization(17)
NUM_TIMESTEPS = 6
LEVELS = schedules.linear_log_snr(5.0, -5.0).levels(NUM_TIMESTEPS)
RNG = np.random.default_rng(0)
X_0 = np.asarray(QUANTIZATION.to_data(RNG.integers(0, 17, (3, 2, 2, 1))))
TABLE = RNG.normal(size=(3, NUM_TIMESTEPS + 1, 2, 2, 1)).astype(np.float32)


def network(theta, name="eps", variance="beta_tilde"):
    return Reverse(lambda x, l, condition=None: jnp.tanh(theta * x), name, variance)


@pytest.mark.parametrize(
    ("decoder", "variance"), [("discretized_gaussian", "beta_tilde"), ("categorical", "beta")]
)
def test_expectation_of_vlb_over_all_timesteps_is_the_bound(decoder, variance):
    """With the noise of (example, t) fixed the mean over t = 1 … T is exactly the full sum."""
    decode = decoders.DECODERS[decoder](QUANTIZATION)
    model = network(0.5, "v", variance)

    @jax.jit
    def both():
        noise = problems.tabulated(TABLE, np.arange(3))

        def at(t):
            t = jnp.full(3, t)
            return objectives.vlb(model, decode, X_0, noise(t), t, LEVELS)

        return jax.vmap(at)(jnp.arange(1, NUM_TIMESTEPS + 1)), bound.bound(
            model, decode, X_0, LEVELS, noise
        )

    losses, whole = both()
    np.testing.assert_allclose(losses.mean(0), np.asarray(whole.total) / (4 * np.log(2)), rtol=2e-6)


def test_vlb_of_a_single_noisy_level_is_the_bound():
    levels = schedules.linear_beta(10, 0.1, 0.5).levels(1)
    decode, eps = decoders.categorical(QUANTIZATION), TABLE[:, 1]

    @jax.jit
    def both():
        whole = bound.bound(network(0.5), decode, X_0, levels, problems.constant(eps))
        loss = objectives.vlb(network(0.5), decode, X_0, eps, np.ones(3, int), levels)
        return loss, whole.total

    loss, total = both()
    np.testing.assert_allclose(loss, np.asarray(total) / (4 * np.log(2)), rtol=1e-6)


@pytest.mark.parametrize("name", list(reverse.PARAMETERIZATIONS))
def test_simple_is_the_mean_squared_error_of_eps_and_the_kl_without_its_weight(name):
    """KL_t = w_t d L_simple, with Ho et al.'s weight w in α and β, whatever is predicted."""
    alpha_bar = 1 / (1 + np.exp(-LEVELS.log_snr[1:]))
    alpha = alpha_bar[1:] / alpha_bar[:-1]
    beta_tilde = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * (1 - alpha)
    weight = (1 - alpha) ** 2 / (2 * beta_tilde * alpha * (1 - alpha_bar[1:]))
    model, decode = network(0.5, name), decoders.categorical(QUANTIZATION)

    @jax.jit
    def losses(t):
        noise = problems.tabulated(TABLE, np.arange(3))
        eps, step = noise(t), LEVELS.step(t)
        x_t = bound.diffuse(X_0, step.log_snr, eps)
        return (
            objectives.simple(model, decode, X_0, eps, t, LEVELS),
            bound.step_terms(model, X_0, eps, step).kl,
            (eps - model.predict("eps", x_t, step.log_snr)) ** 2,
        )

    for t in range(1, NUM_TIMESTEPS + 1):
        simple, kl, squared = (np.asarray(of, np.float64) for of in losses(np.full(3, t)))
        assert simple.shape == (3,)
        # Recovering ε̂ at λ = 5 costs e^5 roundings; the loss itself never does.
        np.testing.assert_allclose(simple, squared.mean((1, 2, 3)), rtol=2e-4)
        if t > 1:
            np.testing.assert_allclose(kl, weight[t - 2] * 4 * simple, rtol=1e-5)


@pytest.mark.parametrize(
    ("decoder", "variance"), [("categorical", "beta_tilde"), ("discretized_gaussian", "beta")]
)
def test_gradients_are_finite_at_every_timestep_and_those_of_the_terms(decoder, variance):
    """At t = 1 the gap is infinite, and the loss there is the reconstruction alone."""
    t = np.arange(1, NUM_TIMESTEPS + 1)
    rows = np.arange(NUM_TIMESTEPS) % 3
    x_0, eps = X_0[rows], TABLE[rows, t]
    decode = decoders.DECODERS[decoder](QUANTIZATION)

    @jax.jit
    @jax.jacrev
    def gradients(theta):
        model = network(theta, "v", variance)
        return (
            objectives.vlb(model, decode, x_0, eps, t, LEVELS),
            objectives.simple(model, decode, x_0, eps, t, LEVELS),
            bound.reconstruction(model, decode, x_0[:1], eps[:1], LEVELS),
        )

    vlb, simple, reconstruction = gradients(0.4)
    assert np.all(np.isfinite(vlb))
    assert np.all(np.isfinite(simple))
    assert np.all(np.asarray(simple) != 0)
    expected = NUM_TIMESTEPS * float(reconstruction[0]) / (4 * np.log(2))
    assert float(vlb[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", list(objectives.OBJECTIVES))
def test_objectives_take_a_batch_of_one_in_any_shape(name):
    x_0 = np.zeros((1, 5, 3, 3), np.float32)
    decode = decoders.categorical(QUANTIZATION)
    loss = objectives.OBJECTIVES[name](network(0.5), decode, x_0, x_0 + 1, np.ones(1, int), LEVELS)
    assert loss.shape == (1,)
    assert np.isfinite(loss[0])
