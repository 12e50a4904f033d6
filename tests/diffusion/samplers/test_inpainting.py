"""Inpainting of Gaussian data, whose conditionals are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from diffusion.exact import distributions
from diffusion.forward import example_noise
from diffusion.samplers import base, ddpm, registry
from diffusion.samplers.base import Sampler
from diffusion.samplers.inpainting import inpainted
from tests.diffusion import oracles, problems
from tests.diffusion.samplers.test_langevin import linear_moments

pytestmark = pytest.mark.usefixtures("quick_compiles")

CORRELATED = distributions.normal(np.array([0.2, -0.1]), np.array([[1.0, 0.8], [0.8, 1.5]]))
INDEPENDENT = distributions.normal(np.array([0.2, -0.1]), np.diag([1.0, 0.3]))
KNOWN = np.array([1.2, np.nan])  # what is said of the unknown coordinate must not matter
MASK = np.array([1, 0])


def predicting(*args):
    return problems.without_decoder(problems.predicting(*args))


def holding(sampler, rows, num_resamplings):
    return inpainted(sampler, np.tile(KNOWN, (rows, 1)), MASK, num_resamplings)


@pytest.mark.parametrize("name", ["ancestral", "ddim", "heun", "dpm_solver_pp_2m"])
@pytest.mark.parametrize("num_resamplings", [1, 3])
def test_the_known_part_is_exact_and_the_rest_is_finite(name, num_resamplings):
    levels = schedules.linear_log_snr(20.0, -20.0).levels(8)
    sampler = registry.SAMPLERS[name](predicting(CORRELATED, "x_0"))
    noise = example_noise(jax.random.key(0), jnp.arange(6), (2,))
    held = holding(sampler, 6, num_resamplings)
    samples = jax.jit(lambda: base.sample(held, levels, noise, 6, (3,)))()
    np.testing.assert_array_equal(samples.x_0[:, 0], np.full(6, KNOWN[0], np.float32))
    assert np.all(np.isfinite(samples.x_0))
    assert np.std(samples.x_0[:, 1]) > 0.1
    assert samples.x_t.shape == samples.x_0_hat.shape == (1, 6, 2)
    evaluations = 15 if name == "heun" else 8
    np.testing.assert_array_equal(samples.evaluations, num_resamplings * evaluations)


def test_known_parts_of_states_are_draws_of_the_marginal(float64):
    """At a level the known coordinate has the mean α x_0 and the variance σ², from fresh noise."""
    levels = schedules.linear_log_snr(4.0, -4.0).levels(3)
    n = 20_000
    sampler = holding(ddpm.ddim(predicting(CORRELATED, "v")), n, 2)
    noise = example_noise(jax.random.key(0), jnp.arange(n), (2,))
    samples = jax.jit(lambda: base.sample(sampler, levels, noise, n, (1, 2)))()
    known = np.asarray(samples.x_t)[:, :, 0]
    for x_t, t in zip(known, (1, 2), strict=True):
        variance = levels.sigma2[t]
        expected = np.sqrt(levels.alpha_bar[t]) * KNOWN[0]
        assert abs(x_t.mean() - expected) < 4 * np.sqrt(variance / n)
        assert abs(x_t.var() - variance) < 4 * variance * np.sqrt(2 / n)
    assert abs(np.corrcoef(known)[0, 1]) < 4 / np.sqrt(n)


def test_independent_coordinates_keep_their_marginals():
    """Where nothing is to be learnt from the known part the rest is what it would have been."""
    levels = schedules.linear_log_snr(6.0, -6.0).levels(15)
    plain = ddpm.ancestral(predicting(INDEPENDENT, "v"))
    expected_mean, expected = linear_moments(lambda rows: plain, levels, 2)
    mean, covariance = linear_moments(lambda rows: holding(plain, rows, 1), levels, 2)
    assert mean[1] == pytest.approx(expected_mean[1], abs=1e-6)
    assert covariance[1, 1] == pytest.approx(expected[1, 1], rel=1e-5)
    np.testing.assert_allclose(covariance[0], 0, atol=1e-6)


def test_independent_coordinates_keep_their_marginals_when_resampled(float64):
    """Going back and forth leaves p(x_t) as it is, once the steps are those of the exact reverse.

    Of normal data these have the posterior's variance and that of x_0 given x_t, carried to s.
    """
    levels = schedules.linear_log_snr(6.0, -6.0).levels(12)
    model = problems.predicting(INDEPENDENT, "x_0")

    def step(history, x_t, step, draw):
        del history
        x_0_hat = model.predict("x_0", x_t, step.log_snr)
        signal, noise = jax.nn.sigmoid(step.log_snr), jax.nn.sigmoid(-step.log_snr)
        left = 1 / (1 / np.array([1.0, 0.3]) + (signal / noise)[:, None])
        of_x_0 = jax.nn.sigmoid(step.log_snr_s) * step.c**2
        variance = step.posterior_variance[:, None] + of_x_0[:, None] * left
        mean = model.step(x_t, x_0_hat, step).mean
        return (), mean + jnp.sqrt(variance) * draw(0), x_0_hat

    exact_reverse = Sampler(base.no_history, step)
    mean, covariance = linear_moments(lambda rows: holding(exact_reverse, rows, 4), levels, 2)
    # What is left of the prior's error: the start is not exactly p(x_T).
    assert mean[1] == pytest.approx(-0.1, abs=1e-4)
    assert covariance[1, 1] == pytest.approx(0.3, rel=1e-4)


def test_resampling_approaches_the_conditional(float64):
    """Of the unknown coordinate given the known one: the errors of mean and variance both fall."""
    levels = schedules.linear_log_snr(7.0, -6.0).levels(25)
    model = predicting(CORRELATED, "v", "beta")
    (m_known, m_rest), covariance = CORRELATED.mean, CORRELATED.covariance
    slope = covariance[0, 1] / covariance[1, 1]
    noise_variance = covariance[0, 0] - slope * covariance[0, 1]
    expected = oracles.condition(
        m_rest, covariance[1, 1], slope, noise_variance, KNOWN[0] - m_known + slope * m_rest
    )
    errors = []
    for num_resamplings in (1, 4, 16):
        mean, found = linear_moments(
            lambda rows, n=num_resamplings: holding(ddpm.ancestral(model), rows, n), levels, 2
        )
        errors.append([abs(mean[1] - expected[0]), abs(found[1, 1] - expected[1])])
    errors = np.array(errors)
    assert np.all(errors[1:] < 0.6 * errors[:-1])


def test_history_advances_once_a_level_and_every_repetition_starts_from_it(float64):
    """A sampler that counts: each step sees the count of the levels before, and adds to it."""

    def step(history, x_t, step, draw):
        del step, draw
        return history + 1, x_t + history, x_t

    counting = Sampler(lambda x_T: jnp.zeros(()), step, num_draws=0)
    sampler = inpainted(counting, jnp.zeros((2, 3)), np.zeros((2, 3), bool), num_resamplings=3)
    # Nothing is known, and a step of almost no gap takes almost nothing back.
    levels = schedules.linear_log_snr(1.0, 1.0 - 3e-13).levels(4)
    noise = problems.constant(jnp.zeros((2, 3)))
    state = base.start(sampler, jnp.zeros((2, 3)))
    for t in (4, 3, 2):
        at = jnp.full(2, t)
        state = base.advance(sampler, state, at, levels.step(at), noise, 4)
        assert float(state.history) == 5 - t
    np.testing.assert_allclose(state.x, 3 * (0 + 1 + 2), rtol=1e-9)


@pytest.mark.parametrize("name", ["dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc"])
def test_a_repeated_step_of_a_multistep_solver_is_of_first_order(name, float64):
    """That is DDIM's: extrapolating from predictions on the way that was left is unstable."""
    levels = schedules.linear_log_snr(6.0, -6.0).levels(10)
    model = predicting(INDEPENDENT, "v")
    noise = example_noise(jax.random.key(0), jnp.arange(4), (2,))
    made = [
        base.sample(holding(registry.SAMPLERS[of](model), 4, 3), levels, noise, 4).x_0
        for of in (name, "ddim")
    ]
    np.testing.assert_allclose(*made, rtol=1e-9, atol=1e-12)
    once = [
        base.sample(holding(registry.SAMPLERS[of](model), 4, 1), levels, noise, 4).x_0
        for of in (name, "ddim")
    ]
    assert np.abs(once[0] - once[1]).max() > 1e-3


def test_one_pass_draws_no_transition_and_numbers_each_draw_once():
    """R passes of a sampler with k draws ask for R (k + 1) noises, and R − 1 ways back."""
    model = predicting(CORRELATED, "eps")
    levels = schedules.linear_log_snr(5.0, -5.0).levels(4)
    for num_resamplings in (1, 3):
        sampler = holding(ddpm.ancestral(model), 2, num_resamplings)
        asked = []

        def draw(k, asked=asked):
            jax.debug.callback(lambda k: asked.append(int(k)), k)
            return jnp.zeros((2, 2))

        step = levels.step(jnp.full(2, 3))
        jax.block_until_ready(sampler.step((), jnp.zeros((2, 2)), step, draw))
        jax.effects_barrier()
        assert sorted(asked) == list(range(3 * num_resamplings - 1))
        assert sampler.num_draws == len(asked)


def test_a_step_must_be_made():
    with pytest.raises(ValueError, match="num_resamplings = 0"):
        inpainted(
            ddpm.ddim(problems.without_decoder(problems.imperfect())), np.zeros((1, 2)), MASK, 0
        )
